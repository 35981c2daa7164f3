"""Advantages from one reward per completion."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_no_negative_rewards, check_rewards, check_subset_size
from .spread import constant, deviation, group_std, std_floor

EPS = 1e-6


def group_normalised_advantage(rewards: Tensor) -> Tensor:
    """Each reward relative to its group, in units of the group's standard deviation.

        A_i = (r_i - mean(r)) / max(std(r), floor)       std with ddof = 1
        floor = max(1e-6, 16 eps max|r|)                 eps of fp32 (fp64 for fp64 rewards)

    Args:
        rewards: [B, G], any real dtype, G >= 2 completions of each of B prompts.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.

    Raises:
        ValueError: rewards not [B, G] with G >= 2, or, on the CPU, not finite.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    check_rewards(rewards)
    rewards = constant(rewards)
    return deviation(rewards) / torch.maximum(group_std(rewards), std_floor(rewards, -1))


def centred_advantage(rewards: Tensor) -> Tensor:
    """Each reward less the mean of its group: Dr. GRPO's advantage, A_i = r_i - mean(r).

    Args, Returns, Raises: those of `group_normalised_advantage`.

    Liu et al., 2025 (arXiv:2503.20783).
    """
    check_rewards(rewards)
    return deviation(constant(rewards))


def batch_normalised_advantage(rewards: Tensor) -> Tensor:
    """Each reward relative to its group, in units of the whole batch's standard deviation.

        A_bi = (r_bi - mean(r_b)) / max(std(r), floor_b)     std of all B·G rewards, ddof = 1

    with the floor of `group_normalised_advantage`. Args, Returns, Raises: those of that function.

    Liu et al., 2025 (arXiv:2508.08221).
    """
    check_rewards(rewards)
    rewards = constant(rewards)
    std = (rewards - rewards[:1, :1]).std()
    return deviation(rewards) / torch.maximum(std, std_floor(rewards, -1))


def leave_one_out_advantage(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the others in its group: RLOO.

        A_i = r_i - mean(r_j over j != i) = G / (G - 1) · (r_i - mean(r))

    Args, Returns, Raises: those of `group_normalised_advantage`.

    Ahmadian et al., 2024 (arXiv:2402.14740).
    """
    check_rewards(rewards)
    G = rewards.shape[1]
    return deviation(constant(rewards)) * (G / (G - 1))


def max_rl_advantage(rewards: Tensor) -> Tensor:
    """Each reward relative to its group, in units of the group's mean: MaxRL.

        A_i = (r_i - mean(r)) / (mean(r) + 1e-6)             in [-1, G - 1]

    Rewards are at least 0. A mean of 0 is a group of zeros, and its advantages are 0. Where the
    values are not looked at (on a GPU), a group of negative mean has advantages of 0 too.

    Args, Returns, Raises: those of `group_normalised_advantage`; on the CPU a negative reward is a
    ValueError too.

    Tajwar et al., 2026 (arXiv:2602.02710).
    """
    check_rewards(rewards)
    check_no_negative_rewards(rewards)
    rewards = constant(rewards)
    mean = rewards.mean(dim=-1, keepdim=True)
    return torch.where(mean <= 0, 0.0, deviation(rewards) / (mean + EPS))


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": group_normalised_advantage,
    "batch": batch_normalised_advantage,
    "none": centred_advantage,
    "leave_one_out": leave_one_out_advantage,
    "max_rl": max_rl_advantage,
}


def pass_at_k_advantage(rewards: Tensor, k: int) -> Tensor:
    """What a completion adds to the best of k, averaged over the sets of k that it is in.

        A_i = mean over S with i in S, |S| = k of  max(r over S) - max(r over S without i)

    Never negative: the rest of the set is the baseline. The mean over completions of A_i times the
    gradient of the log-prob is, without bias, 1/k of the gradient of the expected best of k. With
    k = G only a single best completion has an advantage.

    In closed form, with the group sorted upwards: r_a is the best of S, and r_b the best of the
    rest, in C(b, k-2) of C(G-1, k-1) sets, for b < a. Summed by parts,

        A_a = Σ_{c <= a} C(c, k-1) / C(G-1, k-1) · (r_c - r_{c-1})

    Args:
        rewards: [B, G], any real dtype, G >= 2 completions of each of B prompts.
        k: size of the sets, 2 to G.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.

    Raises:
        TypeError: k is no integer.
        ValueError: k outside [2, G]; rewards not [B, G] with G >= 2, or, on the CPU, not finite.

    Tang et al., 2025 (arXiv:2503.19595).
    """
    check_rewards(rewards)
    G = rewards.shape[1]
    check_subset_size(k, G)
    ordered, order = constant(rewards).sort(dim=-1)
    gaps = ordered.diff(dim=-1, prepend=ordered[:, :1])
    # C(c, k-1) / C(c+1, k-1) for c = G-2 .. 0; their products are the chances that are asked for.
    above = torch.arange(G - 1, 0, -1, dtype=gaps.dtype, device=gaps.device)
    ratios = ((above - (k - 1)) / above).clamp_min(0)
    chances = F.pad(ratios, (1, 0), value=1.0).cumprod(dim=0).flip(0)
    # Not `cumsum`: torch.use_deterministic_algorithms refuses it on a GPU.
    up_to = torch.ones(G, G, dtype=torch.bool, device=gaps.device).tril()
    gained = torch.where(up_to, (gaps * chances)[:, None], 0.0).sum(dim=-1)
    return gained.gather(1, order.argsort(dim=-1))
