"""Per-token estimates of KL(policy‖ref) from the sampled tokens."""

import torch
from torch import Tensor

from reference.losses.ratios import clamp, saturated_exp


def sampled_kl(logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy‖ref) from d = logprob - ref_logprob; s() stops the gradient.

    k1            d
    k2            d²/2
    k3            e^(-d) - 1 + d
    k3+           k3 with the gradient of k2
    k3_corrected  exp(logprob - old_logprob) · k3
    abs           |d|
    """
    d = logprob - ref_logprob
    k2 = d * d / 2
    bounded = clamp(d, -20)  # e^(-d) overflows on this side only
    k3 = torch.expm1(-bounded) + bounded
    return {
        "k1": d,
        "k2": k2,
        "k3": k3,
        "k3+": k3.detach() + (k2 - k2.detach()),
        "k3_corrected": saturated_exp(logprob - old_logprob) * k3,
        "abs": d.abs(),
    }[estimator]
