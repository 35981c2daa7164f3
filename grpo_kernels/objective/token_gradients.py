"""One token's terms in the loss, and their weighted sum.

The tables say what a term is: surrogates.py, sampled_kl.py, token_filters.py. Where a token's loss
follows from the token alone, a chunk of tokens has the loss and the gradient that it has within its
batch, given the tokens' weights.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kl_estimators import SAMPLED_KL
from .ratios import saturated_exp
from .sequences import Sequences
from .surrogates import RATIO_LEVELS, SURROGATES, PolicyRatios
from .token_selection import FILTERS, covariance_penalty, importance, kept_by_filters

if TYPE_CHECKING:
    from .config import LossConfig


class LossInputs(NamedTuple):
    """What the loss reads of each token beside the policy's own outputs; nothing is differentiated.

    All have one entry per token, but for `entropy_weight`, which is 0-dim.
    """

    advantage: Tensor
    weight: Tensor  # of the token's term in the loss; 0 where masked
    entropy_weight: Tensor | None  # of the sum of the entropies; None without a bonus
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    sampling_logprob: Tensor | None

    def with_old(self, logprob: Tensor) -> "LossInputs":
        """The policy is compared with itself where no old one is given."""
        return self if self.old_logprob is not None else self._replace(old_logprob=logprob.detach())

    def map(self, function: Callable[[Tensor], Tensor]) -> "LossInputs":
        """Apply a function to every per-token tensor."""
        return LossInputs(*(x if x is None or x.dim() == 0 else function(x) for x in self))


def is_token_level(config: "LossConfig", *, has_sampling: bool) -> bool:
    """Whether a token's loss follows from the token alone, so that its gradient can come with it.

    has_sampling: whether the sampler's log-probabilities are given.
    """
    return (
        config.ratio_level == "token"
        and not SURROGATES[config.surrogate].of_sequences
        and not (has_sampling and config.importance_level == "sequence")
        and config.kl_cov is None
        and all(getattr(config, name) is None for name in FILTERS)
    )


def zero_advantage_has_zero_grad(config: "LossConfig", *, per_sequence: bool) -> bool:
    """Whether a token whose advantage is 0 surely has no gradient.

    per_sequence: all tokens of a sequence have one advantage. Where they have not, a term of the
    whole sequence hands its gradient to tokens whose own advantage is 0.
    """
    spreads = config.ratio_level == "sequence" or config.surrogate == "gmpo"
    return (
        (per_sequence or not spreads)
        and config.beta == 0
        and config.entropy_coef == 0
        and config.kl_cov is None
    )


class TokenLosses(NamedTuple):
    """The terms of each token, and what is told of them."""

    policy: Tensor
    kl: Tensor | None
    entropy: Tensor | None  # that the bonus sums
    ratios: PolicyRatios
    kept: Tensor | None  # by the filters of the config; None without one


def token_losses(
    logprob: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    loss_inputs: LossInputs,
    config: "LossConfig",
    sequences: Sequences,
) -> TokenLosses:
    """Each token's terms. kl is given over the vocabulary, or estimated with a ref_logprob."""
    log_ratio = logprob - loss_inputs.old_logprob
    weight = None
    if loss_inputs.sampling_logprob is not None:
        weight = importance(loss_inputs, config, sequences)
    ratio = saturated_exp(RATIO_LEVELS[config.ratio_level](log_ratio, sequences))
    ratios = PolicyRatios(
        logprob, loss_inputs.old_logprob, ratio, loss_inputs.advantage, weight, sequences
    )
    policy = SURROGATES[config.surrogate].value(ratios, config)
    kept = kept_by_filters(ratios, entropy, loss_inputs, config)
    for each in kept.values():
        policy = torch.where(each | policy.isnan(), policy, 0.0)  # a broken token shows
    if weight is not None and config.surrogate != "vespo":  # whose own weight contains this one
        policy = policy * weight
    if config.kl_cov is not None:
        policy = policy + covariance_penalty(ratios, config)
    if loss_inputs.ref_logprob is not None:
        kl = SAMPLED_KL[config.kl_estimator].value(logprob - loss_inputs.ref_logprob, log_ratio)
    if "top_entropy" in kept:
        entropy = _over_chosen(entropy, kept["top_entropy"], sequences.keep)
    all_kept = functools.reduce(torch.logical_and, kept.values()) if kept else None
    return TokenLosses(policy, kl, entropy, ratios, all_kept)


def _over_chosen(entropy: Tensor, chosen: Tensor, keep: Tensor) -> Tensor:
    """The chosen tokens' entropies, scaled so that their mean over all tokens is the chosen's."""
    scale = keep.sum().to(entropy.dtype) / chosen.sum().clamp(min=1)
    return torch.where(chosen, entropy, 0.0) * scale


def weighted_sum(terms: TokenLosses, loss_inputs: LossInputs, config: "LossConfig") -> Tensor:
    """Σ weight·(policy + beta·KL) - entropy_weight·Σ entropy: the loss, or a chunk's part of it."""
    term = terms.policy if config.beta == 0 else terms.policy + config.beta * terms.kl
    loss = (loss_inputs.weight * term).sum()
    if loss_inputs.entropy_weight is not None:
        loss = loss - loss_inputs.entropy_weight * terms.entropy.sum()
    return loss


class TokenGrads(NamedTuple):
    """The gradient of a loss in the statistics of its tokens; None is zero."""

    logprob: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None


def token_gradients(logprob: Tensor, loss_inputs: LossInputs, config: "LossConfig") -> TokenGrads:
    """The gradient of `weighted_sum` where `is_token_level`, without autograd.

    Of the kl where it is over the vocabulary: where no ref_logprob is given.
    """
    loss_inputs = loss_inputs.with_old(logprob)
    log_ratio = logprob - loss_inputs.old_logprob
    ratios = PolicyRatios(
        logprob,
        loss_inputs.old_logprob,
        saturated_exp(log_ratio),
        loss_inputs.advantage,
        None,
        None,
    )
    grad = SURROGATES[config.surrogate].grad(ratios, config)
    if loss_inputs.sampling_logprob is not None:
        grad = grad * importance(loss_inputs, config)
    entropy = kl = None
    if config.beta != 0 and loss_inputs.ref_logprob is not None:
        of_kl = SAMPLED_KL[config.kl_estimator].grad(logprob - loss_inputs.ref_logprob, log_ratio)
        grad = grad + config.beta * of_kl
    elif config.beta != 0:
        kl = config.beta * loss_inputs.weight
    if loss_inputs.entropy_weight is not None:
        entropy = (-loss_inputs.entropy_weight).expand_as(logprob)
    return TokenGrads(loss_inputs.weight * grad, entropy, kl)
