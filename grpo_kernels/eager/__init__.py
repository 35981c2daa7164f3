"""The row functions in chunked PyTorch, for every tensor that Triton does not serve."""

from .token_stats import token_stats_backward, token_stats_forward

__all__ = ["token_stats_backward", "token_stats_forward"]
