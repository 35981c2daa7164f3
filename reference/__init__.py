"""Plain-PyTorch reference implementations and the training script."""
