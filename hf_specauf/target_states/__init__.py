"""The target's hidden states of a run's rows, computed once and kept on disk.

A row's states depend on nothing but the row: each row has a pass of its own, without padding. So
they are found again whatever batch, run or order the row comes in, and whoever computes them anew
writes the same bytes.
"""
