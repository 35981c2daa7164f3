"""Probability ratios: the policy's to the old one's, and the old one's to the sampler's."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.losses.sequences import Tokens, sequence_mean, sequence_sum


def log_ratio(tokens: Tokens) -> Tensor:
    """l = logprob - old, per token."""
    return tokens.logprob - tokens.old


def saturated_exp(x: Tensor) -> Tensor:
    """e^x; beyond ±20 it stays where it is, with gradient 0."""
    return x.clamp(-20, 20).exp()


def policy_ratio(tokens: Tokens, level: str) -> Tensor:
    """r at every token, by level; s() stops the gradient, the mean is the sequence's.

    "token"           exp(l)
    "sequence"        exp(mean of l)                                  GSPO, 2507.18071
    "sequence_token"  exp(s(mean of l) + logprob - s(logprob))        GSPO-token, ibid.
    """
    own = log_ratio(tokens)
    mean = sequence_mean(own, tokens.keep)
    if level == "token":
        return saturated_exp(own)
    if level == "sequence":
        return saturated_exp(mean)
    if level == "sequence_token":
        return saturated_exp(mean.detach() + (tokens.logprob - tokens.logprob.detach()))
    raise ValueError(f"no such ratio_level: {level!r}")


def importance_weight(tokens: Tokens, config: Any) -> Tensor | None:
    """w at every token, a constant; None where no sampler's log-probabilities are given.

    w = exp(old - sampling), of the sequence's sum of it at importance_level="sequence"; then

    "truncate"  clamp(w, floor, cap)               truncated importance sampling
    "mask"      w inside [floor, cap], 0 outside   IcePop
    """
    if tokens.sampling is None:
        return None
    difference = tokens.old - tokens.sampling
    if config.importance_level == "sequence":
        difference = sequence_sum(difference, tokens.keep)
    elif config.importance_level != "token":
        raise ValueError(f"no such importance_level: {config.importance_level!r}")
    weight = saturated_exp(difference)
    floor = 0.0 if config.importance_floor is None else config.importance_floor
    cap = math.inf if config.importance_cap is None else config.importance_cap
    if config.importance_mode == "truncate":
        return weight.clamp(floor, cap)
    if config.importance_mode == "mask":
        return torch.where((floor <= weight) & (weight <= cap), weight, 0.0)
    raise ValueError(f"no such importance_mode: {config.importance_mode!r}")
