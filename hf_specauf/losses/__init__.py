"""Token rows become blocks, and blocks a loss. Pure tensors: no Trainer, no files."""
