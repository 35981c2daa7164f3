"""Estimates of the KL to the reference policy on sampled tokens, each with its gradient.

All are functions of d = logprob - ref_logprob and of the token's log-ratio, logprob - old_logprob.
The gradient is the derivative in logprob, which both contain. `policy_loss` says which KL's
gradient each estimate has in expectation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO, at_least, saturated_exp, saturated_exp_grad

VOCABULARY_KL = ("forward", "reverse")  # not estimates: sums over the vocabulary


class KLEstimator(NamedTuple):
    """An estimate, and its derivative in the log-prob, both functions of (d, log_ratio).

    Autograd of `value` gives `grad` too, but with some fifty operators for each chunk of tokens.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]


def _k3(d: Tensor) -> Tensor:
    d = at_least(d, -MAX_LOG_RATIO)  # for large d, e^(-d) only vanishes
    return torch.expm1(-d) + d


def _k3_grad(d: Tensor) -> Tensor:
    return torch.where(d < -MAX_LOG_RATIO, 0.0, -torch.expm1(-d.clamp(min=-MAX_LOG_RATIO)))


def _k2(d: Tensor) -> Tensor:
    return d * d / 2


def _k3_corrected_grad(d: Tensor, log_ratio: Tensor) -> Tensor:
    """r·k3 + r·k3', which is r·d where nothing saturates: two terms in e^(-d) cancel."""
    ratio = saturated_exp(log_ratio)
    d_ratio = saturated_exp_grad(log_ratio, ratio)
    product_rule = d_ratio * _k3(d) + ratio * _k3_grad(d)
    return torch.where((d_ratio != 0) & (d >= -MAX_LOG_RATIO), ratio * d, product_rule)


def _k3_corrected(d: Tensor, log_ratio: Tensor) -> Tensor:
    """r·k3 with the gradient above: in fp32 autograd's two terms cancel to 24% off at d = -19."""
    value, grad = saturated_exp(log_ratio) * _k3(d), _k3_corrected_grad(d, log_ratio)
    finite = d.clamp(min=torch.finfo(d.dtype).min)  # -inf - (-inf) would be NaN
    return value.detach() + grad.detach() * (finite - finite.detach())


# The gradients of k1 and abs are NaN where d is, so that it shows; autograd gives 1 and 0.
SAMPLED_KL: dict[str, KLEstimator] = {
    "k1": KLEstimator(lambda d, log_ratio: d, lambda d, log_ratio: torch.where(d.isnan(), d, 1.0)),
    "k2": KLEstimator(lambda d, log_ratio: _k2(d), lambda d, log_ratio: d),
    "k3": KLEstimator(lambda d, log_ratio: _k3(d), lambda d, log_ratio: _k3_grad(d)),
    # k3 with the gradient of k2.
    "k3+": KLEstimator(
        lambda d, log_ratio: _k3(d).detach() + (_k2(d) - _k2(d).detach()), lambda d, log_ratio: d
    ),
    "k3_corrected": KLEstimator(_k3_corrected, _k3_corrected_grad),
    "abs": KLEstimator(
        lambda d, log_ratio: d.abs(), lambda d, log_ratio: torch.where(d.isnan(), d, d.sign())
    ),
}
