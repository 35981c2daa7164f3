"""Advantages from groups of rewards."""

import torch
from torch import Tensor


def group_normalised_advantage(rewards: Tensor) -> Tensor:
    """(reward - mean of its group) / max(std of its group, 1e-6), std with ddof = 1.

    Args:
        rewards: [B, G], G >= 2 completions of each of B prompts.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G >= 2: {tuple(rewards.shape)}")
    if rewards.isnan().any():
        raise ValueError("rewards must not be NaN")
    rewards = rewards.detach().to(
        torch.float64 if rewards.dtype == torch.float64 else torch.float32
    )
    rewards = rewards - rewards[:, :1]  # so that the mean of equal rewards is exact
    std = rewards.std(dim=-1, keepdim=True).clamp(min=1e-6)
    return (rewards - rewards.mean(dim=-1, keepdim=True)) / std
