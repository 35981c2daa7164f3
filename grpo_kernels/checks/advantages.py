"""Checks of rewards, of the steps of a completion, and of what is asked about them."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..validation import expect_finite, expect_number, expect_tensor, shape_of, values_are_readable


def check_rewards(rewards: Tensor) -> None:
    """Rewards [B, G] of groups of at least 2."""
    _check_groups(rewards, "[B, G]")


def check_reward_stack(rewards: Tensor, weights: Sequence[float] | Tensor | None) -> None:
    """K rewards [K, B, G], and a weight for each."""
    _check_groups(rewards, "[K, B, G]")
    K = rewards.shape[0]
    if K < 1:
        raise ValueError(f"rewards must hold at least 1 reward, got {shape_of(rewards)}")
    if isinstance(weights, Tensor):
        _check_real("weights", weights)
        if weights.shape != (K,):
            raise ValueError(f"weights must have shape {(K,)}, got {shape_of(weights)}")
        expect_tensor("weights", weights, device_of=rewards)
        expect_finite("weights", weights)
    elif weights is not None:
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            got = type(weights).__name__
            raise TypeError(f"weights must be a tensor or a sequence of numbers, got {got}")
        if len(weights) != K:
            raise ValueError(f"weights must be {K} numbers, one per reward, got {len(weights)}")
        for n, weight in enumerate(weights):
            expect_number(f"weights[{n}]", weight)


def check_no_negative_rewards(rewards: Tensor) -> None:
    if values_are_readable(rewards) and (rewards < 0).any():
        raise ValueError(f"rewards must be at least 0, got {rewards.min()}")


def check_subset_size(k: object, G: int) -> None:
    _check_integer("k", k)
    if not 2 <= k <= G:
        raise ValueError(f"k must lie in [2, {G}], where {G} is the size of a group, got {k}")


def check_steps(step_rewards: Tensor, step_ends: Tensor, length: object) -> None:
    """Rewards and last tokens [B, G, S] of the steps of completions of so many tokens."""
    _check_real("step_rewards", step_rewards)
    if step_rewards.dim() != 3:
        raise ValueError(f"step_rewards must be [B, G, S], got {shape_of(step_rewards)}")
    expect_tensor("step_ends", step_ends)
    if step_ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"step_ends must be int32 or int64, got {step_ends.dtype}")
    if step_ends.shape != step_rewards.shape:
        raise ValueError(
            f"step_ends must have the shape of step_rewards, {tuple(step_rewards.shape)}, "
            f"got {shape_of(step_ends)}"
        )
    expect_tensor("step_ends", step_ends, device_of=step_rewards)
    _check_integer("length", length)
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    if not values_are_readable(step_ends):
        return
    outside = (step_ends < -1) | (step_ends >= length)
    if outside.any():
        raise ValueError(
            f"step_ends must lie in [0, {length}), or be -1 where there is no step, "
            f"got {step_ends[outside][0]}"
        )
    expect_finite("step_rewards", step_rewards[step_ends >= 0])


def _check_groups(rewards: Tensor, axes: str) -> None:
    _check_real("rewards", rewards)
    if rewards.dim() != axes.count(",") + 1:
        raise ValueError(f"rewards must be {axes}, got {shape_of(rewards)}")
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards must hold at least 2 completions per prompt, got {shape_of(rewards)}: "
            "a group of 1 has nothing to compare with"
        )
    expect_finite("rewards", rewards)


def _check_real(name: str, tensor: object) -> None:
    expect_tensor(name, tensor)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
