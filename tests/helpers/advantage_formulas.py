"""Definitions of the advantages in float64, under the names of the package's functions."""

from math import comb

import torch

FLOOR = 1e-6  # the least standard deviation to divide by


def group_normalised_advantage(rewards):
    return centred_advantage(rewards) / _std(rewards).clamp(min=FLOOR)


def centred_advantage(rewards):
    rewards = rewards - rewards[..., :1]  # so that the mean of equal rewards is exact
    return rewards - rewards.mean(dim=-1, keepdim=True)


def batch_normalised_advantage(rewards):
    return centred_advantage(rewards) / rewards.std().clamp(min=FLOOR)


def leave_one_out_advantage(rewards):
    others = rewards.sum(dim=-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def max_rl_advantage(rewards):
    return centred_advantage(rewards) / (rewards.mean(dim=-1, keepdim=True) + 1e-6)


def pass_at_k_advantage(rewards, k):
    """Mean of max(S) - max(S without i) over the sets S of k completions that contain i.

    The reward at sorted place b is the best of the others in C(b, k - 2) of these sets.
    """
    B, G = rewards.shape
    advantage = torch.zeros_like(rewards)
    for row in range(B):
        ordered, order = rewards[row].sort()
        for a in range(G):
            for b in range(a):
                chance = comb(b, k - 2) / comb(G - 1, k - 1)
                advantage[row, order[a]] += chance * (ordered[a] - ordered[b])
    return advantage


def weighted_reward(rewards, weights=None):
    weights = [1.0] * len(rewards) if weights is None else weights
    return sum(weight * reward for weight, reward in zip(weights, rewards, strict=True))


def multi_reward_advantage(rewards, weights=None):
    std = _std(rewards)
    normalised = torch.where(std <= FLOOR, 0.0, centred_advantage(rewards) / std)
    total = weighted_reward(normalised, weights)
    return total / total.std().clamp(min=FLOOR)


def process_advantage(step_rewards, step_ends, length):
    """Sum of the normalised rewards of the steps that end at a token or after it."""
    B, G, S = step_rewards.shape
    advantage = step_rewards.new_zeros(B, G, length)
    for row in range(B):
        steps = [(g, s) for g in range(G) for s in range(S) if step_ends[row, g, s] >= 0]
        if len(steps) < 2:
            continue
        rewards = torch.stack([step_rewards[row, g, s] for g, s in steps])
        normalised = group_normalised_advantage(rewards[None])[0]
        for (g, s), value in zip(steps, normalised, strict=True):
            advantage[row, g, : step_ends[row, g, s] + 1] += value
    return advantage


def _std(rewards):
    return (rewards - rewards[..., :1]).std(dim=-1, keepdim=True)
