"""Advantages of tokens from rewards of the steps of a completion."""

import torch
from torch import Tensor

from ..checks import check_steps
from .spread import constant, std_floor


def process_advantage(step_rewards: Tensor, step_ends: Tensor, length: int) -> Tensor:
    """Process supervision: a token's advantage is the sum over the steps that it leads up to.

        Ã_s = (r_s - mean(r)) / max(std(r), floor)       over all steps of the group, ddof = 1
        A_t = Σ Ã_s over the completion's steps s that end at token t or after it

    with the floor of `group_normalised_advantage`. A group of one step has advantages of 0.

    Args:
        step_rewards: [B, G, S], any real dtype; anything where there is no step.
        step_ends: [B, G, S], int32 or int64: the index of the step's last token, in any order; -1
            where there is no step.
        length: T, tokens of a completion.

    Returns:
        [B, G, T], fp32 (fp64 for fp64 rewards), not differentiable; 0 behind the last step.

    Raises:
        TypeError: step_ends or length are no integers.
        ValueError: shapes that differ; on the CPU, a step that ends outside [0, T) or whose reward
            is not finite.

    Shao et al., 2024 (arXiv:2402.03300), 4.1.3.
    """
    check_steps(step_rewards, step_ends, length)
    B, G, S = step_ends.shape
    rewards = constant(step_rewards)
    advantage = rewards.new_zeros(B, G, length)
    if step_ends.numel() == 0:
        return advantage
    normalised = _normalised_where(rewards.flatten(1), (step_ends >= 0).flatten(1))
    tokens = torch.arange(length, device=step_ends.device)
    for reward, end in zip(normalised.view(B, G, S).unbind(-1), step_ends.unbind(-1), strict=True):
        advantage += torch.where(tokens <= end[..., None], reward[..., None], 0.0)
    return advantage


def _normalised_where(rewards: Tensor, there: Tensor) -> Tensor:
    """`group_normalised_advantage` of the rewards [B, n] that are there, 0 for the others."""
    largest = torch.where(there, rewards, -torch.inf).amax(dim=-1, keepdim=True)
    shifted = torch.where(there, rewards - largest, 0.0)  # equal rewards have a mean of exactly 0
    n = there.sum(dim=-1, keepdim=True).clamp_min(1)
    deviation = torch.where(there, shifted - shifted.sum(dim=-1, keepdim=True) / n, 0.0)
    variance = deviation.square().sum(dim=-1, keepdim=True) / (n - 1).clamp_min(1)
    floor = std_floor(torch.where(there, rewards, 0.0), -1)
    return deviation / torch.maximum(variance.sqrt(), floor)
