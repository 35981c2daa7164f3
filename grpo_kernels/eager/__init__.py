"""The row functions in chunked PyTorch, for every tensor that Triton does not serve."""
