"""Advantages from groups of rewards, [B, G] for G completions of each of B prompts.

Results are fp32 (fp64 for fp64 rewards) and not differentiable. A group of exactly equal rewards
gets exactly 0, and one that differs by rounding only stays small.
"""

from .groups import (
    ADVANTAGES,
    batch_normalised_advantage,
    centred_advantage,
    group_normalised_advantage,
    leave_one_out_advantage,
    max_rl_advantage,
    pass_at_k_advantage,
)
from .several import multi_reward_advantage, weighted_reward
from .steps import process_advantage

__all__ = [
    "ADVANTAGES",
    "batch_normalised_advantage",
    "centred_advantage",
    "group_normalised_advantage",
    "leave_one_out_advantage",
    "max_rl_advantage",
    "multi_reward_advantage",
    "pass_at_k_advantage",
    "process_advantage",
    "weighted_reward",
]
