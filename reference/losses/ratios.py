"""Probability ratios: policy to old policy, and old policy to sampler."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.losses.sequences import Tokens, sequence_mean, sequence_sum


def log_ratio(tokens: Tokens) -> Tensor:
    """Return l = logprob - old_logprob per token."""
    return tokens.logprob - tokens.old_logprob


def clamp(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Clamp with gradient 1 on the bounds too; torch.clamp's is 1 or 0 there, by version."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def saturated_exp(x: Tensor) -> Tensor:
    """Return e^x with x clamped to ±20; the gradient is 0 beyond."""
    return clamp(x, -20, 20).exp()


def policy_ratio(tokens: Tokens, level: str) -> Tensor:
    """Compute the ratio r per token; s() stops the gradient, mean() is over the sequence.

    "token"           exp(l)
    "sequence"        exp(mean(l))                                    GSPO, arXiv:2507.18071
    "sequence_token"  exp(s(mean(l)) + logprob - s(logprob))          GSPO-token, same paper
    """
    if level == "token":
        return saturated_exp(log_ratio(tokens))
    mean = sequence_mean(log_ratio(tokens), tokens.mask)
    if level == "sequence":
        return saturated_exp(mean)
    return saturated_exp(mean.detach() + (tokens.logprob - tokens.logprob.detach()))


def importance_weight(tokens: Tokens, config: Any) -> Tensor | None:
    """Compute the constant weight w per token; None without the sampler's log-probs.

    w = exp(old_logprob - sampling_logprob); at importance_level="sequence" the exponent is summed
    over the sequence. Then

    "truncate"  clamp(w, floor, cap)               truncated importance sampling
    "mask"      w inside [floor, cap], 0 outside   IcePop
    """
    if tokens.sampling_logprob is None:
        return None
    difference = tokens.old_logprob - tokens.sampling_logprob
    if config.importance_level == "sequence":
        difference = sequence_sum(difference, tokens.mask)
    weight = saturated_exp(difference)
    floor = 0.0 if config.importance_floor is None else config.importance_floor
    cap = math.inf if config.importance_cap is None else config.importance_cap
    if config.importance_mode == "truncate":
        return weight.clamp(floor, cap)
    return torch.where((floor <= weight) & (weight <= cap), weight, 0.0)
