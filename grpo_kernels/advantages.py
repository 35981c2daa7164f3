"""Advantages from groups of rewards."""

import torch
from torch import Tensor

from .checks import check_rewards

MIN_STD = 1e-6


def group_normalised_advantage(rewards: Tensor) -> Tensor:
    """Each reward relative to its group, in units of the group's standard deviation.

        A_i = (r_i - mean(r)) / max(std(r), 1e-6)        std with ddof = 1

    A group of exactly equal rewards gets exactly 0. One whose rewards differ only by rounding (a
    std of 1e-8) stays below 0.1, because the std is bounded before the division.

    Args:
        rewards: [B, G], any real dtype, G >= 2 completions of each of B prompts.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.

    Raises:
        ValueError: rewards not [B, G] with G >= 2, or, on the CPU, not finite.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    check_rewards(rewards)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards = rewards.detach().to(dtype)
    # The mean of G equal numbers is not always that number in floating point; of G zeros it is.
    rewards = rewards - rewards[:, :1]
    deviation = rewards - rewards.mean(dim=-1, keepdim=True)
    return deviation / rewards.std(dim=-1, keepdim=True).clamp_min(MIN_STD)
