"""What travels to the Hub. Files here import only torch, transformers and each other."""
