"""Plain-PyTorch twins of the public functions."""

from reference.losses.advantages import (
    ADVANTAGES,
    batch_normalised_advantage,
    centred_advantage,
    group_normalised_advantage,
    leave_one_out_advantage,
    max_rl_advantage,
    multi_reward_advantage,
    pass_at_k_advantage,
    process_advantage,
    weighted_reward,
)
from reference.losses.controllers import AdaptiveEntropy
from reference.losses.grpo_loss import grpo_loss, linear_grpo_loss
from reference.losses.mini_grpo import (
    approximate_kl_divergence,
    cross_entropy_from_logits,
    entropy_from_logits,
    kl_divergence,
)
from reference.losses.policy_loss import LossConfig, LossOutput, policy_loss
from reference.losses.token_stats import (
    TokenPacking,
    TokenStats,
    linear_token_stats,
    pack_tokens,
    token_stats,
)

__all__ = [
    "ADVANTAGES",
    "AdaptiveEntropy",
    "LossConfig",
    "LossOutput",
    "TokenPacking",
    "TokenStats",
    "approximate_kl_divergence",
    "batch_normalised_advantage",
    "centred_advantage",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "group_normalised_advantage",
    "grpo_loss",
    "kl_divergence",
    "leave_one_out_advantage",
    "linear_grpo_loss",
    "linear_token_stats",
    "max_rl_advantage",
    "multi_reward_advantage",
    "pack_tokens",
    "pass_at_k_advantage",
    "policy_loss",
    "process_advantage",
    "token_stats",
    "weighted_reward",
]
