"""A drafter measured: prompts decoded in several ways, and what that says to people."""
