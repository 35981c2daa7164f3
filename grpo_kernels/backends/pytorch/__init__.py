"""The row functions in chunked PyTorch, for every tensor that Triton does not serve."""

from .approximate_kl import approximate_kl_backward, approximate_kl_forward
from .grpo_loss import grpo_loss, scale_
from .jsd import jsd_backward, jsd_forward
from .token_stats import token_stats_backward, token_stats_forward

__all__ = [
    "approximate_kl_backward",
    "approximate_kl_forward",
    "grpo_loss",
    "jsd_backward",
    "jsd_forward",
    "scale_",
    "token_stats_backward",
    "token_stats_forward",
]
