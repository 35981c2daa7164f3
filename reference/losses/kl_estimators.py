"""The KL divergence to the reference, estimated on the sampled tokens."""

import torch
from torch import Tensor


def sampled_kl(logprob: Tensor, old: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy‖ref) on sampled tokens from d = logprob - ref.

    k1 = d, k2 = d²/2, k3 = e^(-d) - 1 + d, abs = |d|; k3_corrected = exp(logprob - old)·k3;
    k3+ has k3's value and k2's gradient.
    """
    d = logprob - ref
    k2 = d * d / 2
    bounded = d.clamp(min=-20)  # e^(-d) overflows on this side only
    k3 = torch.expm1(-bounded) + bounded
    if estimator == "k1":
        return d
    if estimator == "k2":
        return k2
    if estimator == "k3":
        return k3
    if estimator == "k3+":
        return k3.detach() + (k2 - k2.detach())
    if estimator == "k3_corrected":
        return (logprob - old).clamp(-20, 20).exp() * k3
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"no such kl_estimator on sampled tokens: {estimator!r}")
