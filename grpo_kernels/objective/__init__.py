"""Per-token tensors to a loss, in plain PyTorch."""
