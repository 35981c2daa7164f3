"""Fused GRPO losses: per-token log-prob, entropy, KL and the loss, with gradients, from logits."""

from .advantages import group_normalised_advantage
from .functional import (
    approximate_kl_divergence,
    cross_entropy_from_logits,
    entropy_from_logits,
    kl_divergence,
)
from .objective import LossConfig, LossOutput, policy_loss
from .ops.grpo_loss import grpo_loss
from .ops.linear_grpo_loss import linear_grpo_loss
from .ops.linear_token_stats import linear_token_stats
from .ops.packing import TokenPacking, pack_tokens
from .ops.token_stats import TokenStats, token_stats

__all__ = [
    "LossConfig",
    "LossOutput",
    "TokenPacking",
    "TokenStats",
    "approximate_kl_divergence",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "group_normalised_advantage",
    "grpo_loss",
    "kl_divergence",
    "linear_grpo_loss",
    "linear_token_stats",
    "pack_tokens",
    "policy_loss",
    "token_stats",
]
