"""One token's terms in the loss, and their weighted sum.

The tables say what a term is: surrogates.py, sampled_kl.py, token_filters.py. Where a token's loss
follows from the token alone, a chunk of tokens has the loss and the gradient that it has within its
batch, given the tokens' weights.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kl_estimators import SAMPLED_KL
from .ratios import saturated_exp
from .sequences import Sequences
from .surrogates import RATIO_LEVELS, SURROGATES, Moved
from .token_selection import FILTERS, covariance_penalty, importance, kept_by_filters

if TYPE_CHECKING:
    from .config import LossConfig


class Constants(NamedTuple):
    """What the loss reads of each token beside the policy's own outputs; nothing is differentiated.

    All have one entry per token, but for `entropy_weight`, which is 0-dim.
    """

    advantage: Tensor
    weight: Tensor  # of the token's term in the loss; 0 where masked
    entropy_weight: Tensor | None  # of the sum of the entropies; None without a bonus
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    sampling_logprob: Tensor | None

    def with_old(self, logprob: Tensor) -> "Constants":
        """The policy is compared with itself where no old one is given."""
        return self if self.old_logprob is not None else self._replace(old_logprob=logprob.detach())

    def at(self, index: Tensor) -> "Constants":
        """Those of the tokens at `index`."""
        return Constants(
            *(each if each is None or each.dim() == 0 else each[index] for each in self)
        )


def is_per_token(config: "LossConfig", *, has_sampling: bool) -> bool:
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


def may_skip_inert(config: "LossConfig", *, per_sequence: bool) -> bool:
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


class Terms(NamedTuple):
    """The terms of each token, and what is told of them."""

    policy: Tensor
    kl: Tensor | None
    entropy: Tensor | None  # that the bonus sums
    moved: Moved
    kept: Tensor | None  # by the filters of the config; None without one


def token_terms(
    logprob: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    constants: Constants,
    config: "LossConfig",
    sequences: Sequences,
) -> Terms:
    """Each token's terms. kl is given over the vocabulary, or estimated with a ref_logprob."""
    log_ratio = logprob - constants.old_logprob
    weight = None
    if constants.sampling_logprob is not None:
        weight = importance(constants, config, sequences)
    ratio = saturated_exp(RATIO_LEVELS[config.ratio_level](log_ratio, sequences))
    moved = Moved(logprob, constants.old_logprob, ratio, constants.advantage, weight, sequences)
    policy = SURROGATES[config.surrogate].value(moved, config)
    kept = kept_by_filters(moved, entropy, constants, config)
    for each in kept.values():
        policy = torch.where(each | policy.isnan(), policy, 0.0)  # a broken token shows
    if weight is not None and config.surrogate != "vespo":  # whose own weight contains this one
        policy = policy * weight
    if config.kl_cov is not None:
        policy = policy + covariance_penalty(moved, config)
    if constants.ref_logprob is not None:
        kl = SAMPLED_KL[config.kl_estimator].value(logprob - constants.ref_logprob, log_ratio)
    if "top_entropy" in kept:
        entropy = _over_chosen(entropy, kept["top_entropy"], sequences.keep)
    all_kept = functools.reduce(torch.logical_and, kept.values()) if kept else None
    return Terms(policy, kl, entropy, moved, all_kept)


def _over_chosen(entropy: Tensor, chosen: Tensor, keep: Tensor) -> Tensor:
    """The chosen tokens' entropies, scaled so that their mean over all tokens is the chosen's."""
    scale = keep.sum().to(entropy.dtype) / chosen.sum().clamp(min=1)
    return torch.where(chosen, entropy, 0.0) * scale


def weighted_sum(terms: Terms, constants: Constants, config: "LossConfig") -> Tensor:
    """Σ weight·(policy + beta·KL) - entropy_weight·Σ entropy: the loss, or a chunk's part of it."""
    term = terms.policy if config.beta == 0 else terms.policy + config.beta * terms.kl
    loss = (constants.weight * term).sum()
    if constants.entropy_weight is not None:
        loss = loss - constants.entropy_weight * terms.entropy.sum()
    return loss


class Slopes(NamedTuple):
    """The gradient of a loss in the statistics of its tokens; None is zero."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def loss_slopes(logprob: Tensor, constants: Constants, config: "LossConfig") -> Slopes:
    """The gradient of `weighted_sum` where `is_per_token`, without autograd.

    Of the kl where it is over the vocabulary: where no ref_logprob is given.
    """
    constants = constants.with_old(logprob)
    log_ratio = logprob - constants.old_logprob
    moved = Moved(
        logprob, constants.old_logprob, saturated_exp(log_ratio), constants.advantage, None, None
    )
    slope = SURROGATES[config.surrogate].slope(moved, config)
    if constants.sampling_logprob is not None:
        slope = slope * importance(constants, config)
    entropy = kl = None
    if config.beta != 0 and constants.ref_logprob is not None:
        of_kl = SAMPLED_KL[config.kl_estimator].slope(logprob - constants.ref_logprob, log_ratio)
        slope = slope + config.beta * of_kl
    elif config.beta != 0:
        kl = config.beta * constants.weight
    if constants.entropy_weight is not None:
        entropy = (-constants.entropy_weight).expand_as(logprob)
    return Slopes(constants.weight * slope, entropy, kl)
