"""Fused GRPO losses: per-token log-prob, entropy, KL and the loss, with gradients, from logits."""

from .advantages import (
    ADVANTAGES,
    batch_normalised_advantage,
    centred_advantage,
    group_normalised_advantage,
    leave_one_out_advantage,
    length_weighted_advantage,
    max_rl_advantage,
    multi_reward_advantage,
    pass_at_k_advantage,
    process_advantage,
    reinforce_plus_plus_advantage,
    weighted_reward,
)
from .entropy_controller import AdaptiveEntropy
from .lm_head.inputs import HeadAdapter
from .lm_head.token_order import TokenPacking, pack_tokens
from .mini_grpo import (
    approximate_kl_divergence,
    cross_entropy_from_logits,
    entropy_from_logits,
    kl_divergence,
)
from .objective.policy_loss import LossConfig, LossOutput, policy_loss
from .ops.distillation_loss import distillation_loss
from .ops.grpo_loss import grpo_loss
from .ops.linear_distillation_loss import linear_distillation_loss
from .ops.linear_grpo_loss import linear_grpo_loss
from .ops.linear_token_stats import linear_token_stats
from .ops.token_stats import TokenStats, token_stats
from .reward_baseline import EMABaseline
from .sampling_support import TokenSupport, support_from_logits

__version__ = "0.2.0"

__all__ = [
    "ADVANTAGES",
    "AdaptiveEntropy",
    "EMABaseline",
    "HeadAdapter",
    "LossConfig",
    "LossOutput",
    "TokenPacking",
    "TokenStats",
    "TokenSupport",
    "approximate_kl_divergence",
    "batch_normalised_advantage",
    "centred_advantage",
    "cross_entropy_from_logits",
    "distillation_loss",
    "entropy_from_logits",
    "group_normalised_advantage",
    "grpo_loss",
    "kl_divergence",
    "leave_one_out_advantage",
    "length_weighted_advantage",
    "linear_distillation_loss",
    "linear_grpo_loss",
    "linear_token_stats",
    "max_rl_advantage",
    "multi_reward_advantage",
    "pack_tokens",
    "pass_at_k_advantage",
    "policy_loss",
    "process_advantage",
    "reinforce_plus_plus_advantage",
    "support_from_logits",
    "token_stats",
    "weighted_reward",
]
