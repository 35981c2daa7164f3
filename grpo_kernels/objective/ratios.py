"""What the tables of the objective are made of: a formula with its grad, a bounded exponential."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) = 4.9e8: beyond any clip, and far from overflow in a product or a sum.
MAX_LOG_RATIO = 20.0


class Formula(NamedTuple):
    """A term of the loss as a function of its arguments, and its derivative in the log-prob.

    Autograd of `value` gives `grad` too; but it takes some fifty operations to say so, and a loss
    whose gradient is made chunk by chunk asks for each of them.
    """

    value: Callable[..., Tensor]
    grad: Callable[..., Tensor]


def saturated_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def saturated_exp_grad(log_ratio: Tensor, ratio: Tensor) -> Tensor:
    return torch.where(log_ratio.abs() <= MAX_LOG_RATIO, ratio, 0.0)
