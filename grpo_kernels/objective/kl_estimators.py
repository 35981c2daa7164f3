"""Estimates of the KL to the reference on sampled tokens, each with its grad.

All are functions of d = logprob - ref_logprob and the token's log-ratio, logprob - old_logprob; the
grad is d/d(logprob), which both contain. `policy_loss` says whose gradient each one has.
"""

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO, Formula, saturated_exp, saturated_exp_grad

VOCABULARY_KL = ("forward", "reverse")  # not estimates: sums over the vocabulary


def _k3(d: Tensor) -> Tensor:
    d = d.clamp(min=-MAX_LOG_RATIO)  # on the other side e^(-d) only vanishes
    return torch.expm1(-d) + d


def _k3_slope(d: Tensor) -> Tensor:
    return torch.where(d >= -MAX_LOG_RATIO, -torch.expm1(-d.clamp(min=-MAX_LOG_RATIO)), 0.0)


def _k3_plus(d: Tensor) -> Tensor:
    k2 = d * d / 2
    return _k3(d).detach() + (k2 - k2.detach())


def _k3_corrected_slope(d: Tensor, log_ratio: Tensor) -> Tensor:
    """r·k3 + r·k3', which is r·d where nothing saturates: two terms in e^(-d) cancel."""
    ratio = saturated_exp(log_ratio)
    d_ratio = saturated_exp_grad(log_ratio, ratio)
    product_rule = d_ratio * _k3(d) + ratio * _k3_slope(d)
    return torch.where((d_ratio != 0) & (d >= -MAX_LOG_RATIO), ratio * d, product_rule)


def _k3_corrected(d: Tensor, log_ratio: Tensor) -> Tensor:
    """r·k3 with the grad above: in fp32 autograd's two terms cancel to 24% off at d = -19."""
    value, grad = saturated_exp(log_ratio) * _k3(d), _k3_corrected_slope(d, log_ratio)
    finite = d.clamp(min=torch.finfo(d.dtype).min)  # of -inf there is no difference
    return value.detach() + grad.detach() * (finite - finite.detach())


SAMPLED_KL: dict[str, Formula] = {
    "k1": Formula(lambda d, log_ratio: d, lambda d, log_ratio: torch.ones_like(d)),
    "k2": Formula(lambda d, log_ratio: d * d / 2, lambda d, log_ratio: d),
    "k3": Formula(lambda d, log_ratio: _k3(d), lambda d, log_ratio: _k3_slope(d)),
    "k3+": Formula(lambda d, log_ratio: _k3_plus(d), lambda d, log_ratio: d),
    "k3_corrected": Formula(_k3_corrected, _k3_corrected_slope),
    "abs": Formula(lambda d, log_ratio: d.abs(), lambda d, log_ratio: d.sign()),
}
