"""Several rewards per completion: summed before they are normalised, or after."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_reward_stack
from .spread import constant, deviation, group_std, std_floor


def weighted_reward(rewards: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """The weighted sum of several rewards, Σ_k w_k r_k, from which advantages can be taken.

    Args:
        rewards: [K, B, G], any real dtype: K rewards of G >= 2 completions of each of B prompts.
        weights: K numbers, or [K]. None: 1 each.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.

    Raises:
        ValueError: rewards not [K, B, G] with G >= 2; weights not K; on the CPU, not finite.
    """
    check_reward_stack(rewards, weights)
    return _weighted(constant(rewards), weights).sum(dim=0)


def multi_reward_advantage(
    rewards: Tensor, weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Several rewards, each normalised within its group before they are summed: GDPO.

        s = Σ_k w_k (r_k - mean(r_k)) / std(r_k)         mean and std over the group, ddof = 1
        A = s / max(std(s), floor)                       std over the batch, ddof = 1

    so that rewards of different scales count by their weights alone, and two groups of equal sums
    of different rewards are told apart. The batch's mean of s is 0, as each group's is. A reward
    that differs within a group by rounding only adds 0: the last line would enlarge it.

    Args, Returns, Raises: those of `weighted_reward`.

    Liu et al., 2026 (arXiv:2601.05242).
    """
    check_reward_stack(rewards, weights)
    rewards = constant(rewards)
    std = group_std(rewards)
    alike = std <= std_floor(rewards, -1)
    parts = _weighted(torch.where(alike, 0.0, deviation(rewards) / std), weights)
    total = parts.sum(dim=0)
    # The parts of a group may cancel: what is left is as exact as they were.
    return total / torch.maximum(total.std(), std_floor(parts, (0, 2))[0])


def _weighted(parts: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """[K, B, G], each of the K times its weight; numbers go to a GPU without waiting for it."""
    if weights is None:
        return parts
    return torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).detach()
