"""The Trainer of drafters, and what it needs: arguments, checks, memory, checkpoints, optimizer."""
