"""Rejection of tokens, or of whole sequences, on which the policy and the sampler disagree.

A rule bounds an estimate of KL(sampler‖policy), of each token or reduced over its sequence. With
l = old_logprob - sampling_logprob, saturated at ±20:

    k1 = -l        k2 = l²/2        k3 = e^l - 1 - l

k1 is the logarithm of the ratio sampler / policy. Its two bounds are given as ratios.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..validation import expect_number
from .ratios import MAX_LOG_RATIO
from .sequences import Sequences

LEVELS: dict[str, Callable[[Tensor, Sequences], Tensor]] = {
    "token": lambda x, sequences: x,
    "seq_sum": lambda x, sequences: sequences.sum(x),
    "seq_mean": lambda x, sequences: sequences.mean(x),
    "seq_max": lambda x, sequences: sequences.max(x),
}
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
}


class RejectionRule(NamedTuple):
    """Keep a token while the estimate at this level lies in [lowest, highest]."""

    level: str
    estimator: str
    lowest: float
    highest: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "seq_mean_k3=0.01", an upper bound, or "token_k1=0.5:2", both bounds of a ratio.

        One bound of k1 is the upper; the lower is then 1 over it.
        """
        pattern = rf"({'|'.join(LEVELS)})_({'|'.join(ESTIMATORS)})=([^:]+?)(?::([^:]+))?"
        found = re.fullmatch(pattern, text)
        try:
            assert found is not None
            level, estimator, *bounds = found.groups()
            first, *others = [float(bound) for bound in bounds if bound is not None]
        except (AssertionError, ValueError):
            raise ValueError(
                f"rejection must be LEVEL_ESTIMATOR=BOUND, a level of {', '.join(LEVELS)} and an "
                f"estimator of {', '.join(ESTIMATORS)}, such as 'seq_mean_k3=0.01', got {text!r}"
            ) from None
        for bound in (first, *others):
            expect_number(f"the bound of {text!r} in rejection", bound, above=0)
        if estimator != "k1":
            if others:
                raise ValueError(f"{text!r} in rejection must have one bound, of {estimator}")
            return cls(level, estimator, -math.inf, first)
        lower, upper = (first, *others) if others else (1 / first, first)
        if lower > upper:
            raise ValueError(f"the bounds of {text!r} in rejection must rise")
        return cls(level, estimator, math.log(lower), math.log(upper))

    def keeps(self, log_ratio: Tensor, sequences: Sequences) -> Tensor:
        """Find the tokens that the rule keeps; log_ratio is old_logprob - sampling_logprob."""
        bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        estimate = LEVELS[self.level](ESTIMATORS[self.estimator](bounded), sequences)
        return ~((estimate < self.lowest) | (estimate > self.highest))
