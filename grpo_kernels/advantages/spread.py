"""How far the rewards of a group lie from their mean, and when that is only rounding."""

import torch
from torch import Tensor

MIN_STD = 1e-6


def constant(rewards: Tensor) -> Tensor:
    """Detached, in fp32 or fp64."""
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return rewards.detach().to(dtype)


def _from_first(rewards: Tensor) -> Tensor:
    # The mean of G equal numbers is not always that number in floating point; of G zeros it is.
    return rewards - rewards[..., :1]


def deviation(rewards: Tensor) -> Tensor:
    shifted = _from_first(rewards)
    return shifted - shifted.mean(dim=-1, keepdim=True)


def group_std(rewards: Tensor) -> Tensor:
    return _from_first(rewards).std(dim=-1, keepdim=True)


def std_floor(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Below this a standard deviation is rounding: max(1e-6, 16 eps max|values|).

    Equal rewards whose terms were added in another order differ by about eps·|r| per addition.
    With this floor one such difference makes an advantage of at most 1/16, not one of ordinary
    size. Rewards of about 1 that differ in their fourth digit lie far above it.
    """
    largest = values.abs().amax(dim=dim, keepdim=True)
    return (16 * torch.finfo(values.dtype).eps * largest).clamp_min(MIN_STD)
