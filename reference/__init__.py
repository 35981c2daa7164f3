"""Plain-PyTorch twins of the public functions."""
