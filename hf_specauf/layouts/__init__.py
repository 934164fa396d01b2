"""Drafters from anywhere: our folders, adapters, and the folders of other projects."""
