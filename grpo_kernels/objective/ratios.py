"""Inputs of the loss for each token, and the probability ratios computed from them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences

# exp(20) = 4.9e8: beyond any clip, and far from overflow in a product or a sum.
MAX_LOG_RATIO = 20.0


def at_most(x: Tensor, bound: float) -> Tensor:
    """min(x, bound), with gradient 1 on the bound; that of clamp is 1 or 0, by torch's version."""
    return torch.where(x > bound, bound, x)


def at_least(x: Tensor, bound: float) -> Tensor:
    """max(x, bound), with gradient 1 on the bound."""
    return torch.where(x < bound, bound, x)


def saturated_exp(log_ratio: Tensor) -> Tensor:
    return at_most(at_least(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO).exp()


def saturated_exp_grad(log_ratio: Tensor, ratio: Tensor) -> Tensor:
    return torch.where(log_ratio.abs() > MAX_LOG_RATIO, 0.0, ratio)  # NaN stays NaN


class LossInputs(NamedTuple):
    """Inputs of the loss beside the policy's own statistics; none of them is differentiated.

    Each has one entry per token, except `entropy_weight`, which is 0-dim.
    """

    advantage: Tensor
    weight: Tensor  # of the token's term in the loss; 0 where masked
    entropy_weight: Tensor | None  # of the sum of the entropies; None without a bonus
    old_logprob: Tensor | None  # None: the policy is compared with itself
    ref_logprob: Tensor | None
    sampling_logprob: Tensor | None
    nll_weight: Tensor | None = None  # of -logprob in the loss; None without that term

    def map(self, function: Callable[[Tensor], Tensor]) -> "LossInputs":
        """Apply a function to every per-token tensor."""
        return LossInputs._make(x if x is None or x.dim() == 0 else function(x) for x in self)


class PolicyRatios(NamedTuple):
    """Sampled tokens, and how far the policy moved on them since the old policy."""

    logprob: Tensor
    old_logprob: Tensor
    sampling_logprob: Tensor | None
    advantage: Tensor
    log_ratio: Tensor  # logprob - old_logprob of each token, not saturated
    ratio: Tensor  # at the config's ratio_level, saturated
    importance: Tensor | None  # weight of the policy term; None without sampling_logprob
    batch: Sequences | None  # None: a part of a batch, in which sequences do not matter

    @property
    def sequences(self) -> Sequences:
        """Sequences of the batch, where they matter."""
        assert self.batch is not None
        return self.batch

    @property
    def d_ratio(self) -> Tensor:
        """Derivative of a token-level ratio in the log-prob."""
        return saturated_exp_grad(self.log_ratio, self.ratio)

    @property
    def prob_diff(self) -> Tensor:
        """Difference of the token's probability to the one under the old policy."""
        return self.logprob.exp() - self.old_logprob.exp()


# The log-ratio that is exponentiated at every token, from the tokens' own log-ratios.
RATIO_LEVELS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "token": lambda log_ratio, sequences: log_ratio,
    "sequence": lambda log_ratio, sequences: sequences.mean(log_ratio),
    "sequence_token": lambda log_ratio, sequences: (
        sequences.mean(log_ratio).detach() + (log_ratio - log_ratio.detach())
    ),
}
