"""Plain-PyTorch twins of the public functions."""

from reference.advantages import group_normalised_advantage
from reference.functional import (
    approximate_kl_divergence,
    cross_entropy_from_logits,
    entropy_from_logits,
    kl_divergence,
)
from reference.grpo_loss import grpo_loss, linear_grpo_loss
from reference.objective import LossConfig, LossOutput, policy_loss
from reference.token_stats import (
    TokenPacking,
    TokenStats,
    linear_token_stats,
    pack_tokens,
    token_stats,
)

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
