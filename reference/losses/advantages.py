"""Advantages from groups of rewards, [B, G] for G completions of each of B prompts.

Results are fp32 (fp64 for fp64 rewards) and not differentiable.
"""

from collections.abc import Callable, Sequence
from math import comb

import torch
from torch import Tensor


def group_normalised_advantage(rewards: Tensor) -> Tensor:
    """(reward - mean of its group) / max(std of its group, floor), std with ddof = 1.

    The floor is 1e-6, or 16 roundings of the group's largest reward where that is more.

    Args:
        rewards: [B, G], G >= 2 completions of each of B prompts.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.
    """
    rewards = _checked(rewards)
    return _centred(rewards) / torch.maximum(_std(rewards), _floor(rewards))


def centred_advantage(rewards: Tensor) -> Tensor:
    """reward - mean of its group (arXiv:2503.20783)."""
    return _centred(_checked(rewards))


def batch_normalised_advantage(rewards: Tensor) -> Tensor:
    """(reward - mean of its group) / max(std of all rewards, floor) (arXiv:2508.08221)."""
    rewards = _checked(rewards)
    return _centred(rewards) / torch.maximum(rewards.std(), _floor(rewards))


def leave_one_out_advantage(rewards: Tensor) -> Tensor:
    """reward - mean of the others in its group (arXiv:2402.14740)."""
    rewards = _checked(rewards)
    rewards = rewards - rewards[:, :1]  # so that the mean of equal rewards is exact
    others = rewards.sum(dim=-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def max_rl_advantage(rewards: Tensor) -> Tensor:
    """(reward - mean of its group) / (that mean + 1e-6), 0 where it is 0 (arXiv:2602.02710)."""
    rewards = _checked(rewards)
    if (rewards < 0).any():
        raise ValueError(f"rewards must be at least 0, got {rewards.min()}")
    return _centred(rewards) / (rewards.mean(dim=-1, keepdim=True) + 1e-6)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": group_normalised_advantage,
    "batch": batch_normalised_advantage,
    "centered": centred_advantage,
    "leave_one_out": leave_one_out_advantage,
    "max_rl": max_rl_advantage,
}


def pass_at_k_advantage(rewards: Tensor, k: int) -> Tensor:
    """The mean of max(S) - max(S without i) over the sets S of k of the group that hold i.

    Of these sets, C(b, k - 2) have the reward at sorted place b as the best of the others
    (arXiv:2503.19595).
    """
    rewards = _checked(rewards)
    B, G = rewards.shape
    if not 2 <= k <= G:
        raise ValueError(f"k must lie in [2, {G}], got {k}")
    advantage = torch.zeros_like(rewards)
    for row in range(B):
        ordered, order = rewards[row].sort()
        for a in range(G):
            for b in range(a):
                chance = comb(b, k - 2) / comb(G - 1, k - 1)
                advantage[row, order[a]] += chance * (ordered[a] - ordered[b])
    return advantage


def weighted_reward(rewards: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """The weighted sum of K rewards [K, B, G]: [B, G]."""
    return sum(_weighted(rewards, weights))


def multi_reward_advantage(
    rewards: Tensor, weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Each of K rewards [K, B, G] normalised in its group, weighted, summed, over the batch's std.

    The batch's mean is 0 before that division, as the groups' are. A reward that is all but equal
    within a group adds 0 (arXiv:2601.05242).
    """
    rewards = torch.stack([_checked(each) for each in rewards])
    std = _std(rewards)
    parts = _weighted(torch.where(std <= _floor(rewards), 0.0, _centred(rewards) / std), weights)
    # What cancels among the parts leaves a residue of their size.
    floor = torch.stack([_floor(part) for part in parts]).amax(dim=0)
    return sum(parts) / torch.maximum(sum(parts).std(), floor)


def process_advantage(step_rewards: Tensor, step_ends: Tensor, length: int) -> Tensor:
    """DeepSeekMath's process supervision, a token's advantage: [B, G, T].

    Every step's reward is normalised over all steps of its group; the advantage of a token is the
    sum over the steps that end at it or after it (arXiv:2402.03300, 4.1.3).

    Args:
        step_rewards: [B, G, S].
        step_ends: [B, G, S], the index of the step's last token, -1 where there is no step.
        length: T.
    """
    step_rewards = _in_precision(step_rewards)
    B, G, S = step_rewards.shape
    advantage = step_rewards.new_zeros(B, G, length)
    for row in range(B):
        steps = [(g, s) for g in range(G) for s in range(S) if step_ends[row, g, s] >= 0]
        if len(steps) < 2:
            continue
        rewards = torch.stack([step_rewards[row, g, s] for g, s in steps])
        for (g, s), normalised in zip(
            steps, group_normalised_advantage(rewards[None])[0], strict=True
        ):
            advantage[row, g, : step_ends[row, g, s] + 1] += normalised
    return advantage


def _checked(rewards: Tensor) -> Tensor:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G >= 2: {tuple(rewards.shape)}")
    if rewards.isnan().any():
        raise ValueError("rewards must not be NaN")
    return _in_precision(rewards)


def _in_precision(rewards: Tensor) -> Tensor:
    return rewards.detach().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def _centred(rewards: Tensor) -> Tensor:
    rewards = rewards - rewards[..., :1]  # so that the mean of equal rewards is exact
    return rewards - rewards.mean(dim=-1, keepdim=True)


def _std(rewards: Tensor) -> Tensor:
    return (rewards - rewards[..., :1]).std(dim=-1, keepdim=True)


def _floor(rewards: Tensor) -> Tensor:
    eps = torch.finfo(rewards.dtype).eps
    return (16 * eps * rewards.abs().amax(dim=-1, keepdim=True)).clamp(min=1e-6)


def _weighted(rewards: Tensor, weights: Sequence[float] | Tensor | None) -> list[Tensor]:
    weights = [1.0] * len(rewards) if weights is None else weights
    return [_in_precision(weight * each) for weight, each in zip(weights, rewards, strict=True)]
