"""The row functions in chunked PyTorch, for every tensor that Triton does not serve."""

from .approximate_kl import approximate_kl_backward, approximate_kl_forward
from .grpo_loss import grpo_loss, scale_
from .token_stats import token_stats_backward, token_stats_forward

__all__ = [
    "approximate_kl_backward",
    "approximate_kl_forward",
    "grpo_loss",
    "scale_",
    "token_stats_backward",
    "token_stats_forward",
]
