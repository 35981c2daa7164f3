"""Reference implementations of the fused functions, in plain PyTorch."""

from reference.losses.distillation import distillation_loss, linear_distillation_loss
from reference.losses.grpo_loss import grpo_loss, linear_grpo_loss
from reference.losses.mini_grpo import (
    approximate_kl_divergence,
    cross_entropy_from_logits,
    entropy_from_logits,
    kl_divergence,
)
from reference.losses.policy_loss import LossOutput, policy_loss
from reference.losses.token_stats import TokenStats, linear_token_stats, token_stats

__all__ = [
    "LossOutput",
    "TokenStats",
    "approximate_kl_divergence",
    "cross_entropy_from_logits",
    "distillation_loss",
    "entropy_from_logits",
    "grpo_loss",
    "kl_divergence",
    "linear_distillation_loss",
    "linear_grpo_loss",
    "linear_token_stats",
    "policy_loss",
    "token_stats",
]
