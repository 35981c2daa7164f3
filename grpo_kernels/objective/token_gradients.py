"""Gradient of the loss in the statistics of each token, in closed form, for the fused ops.

Where a token's loss depends on the token alone, a chunk of tokens has the same loss and gradient as
within its batch, given the tokens' weights. The fused ops then compute the gradient together with
the statistics, without autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig
from .importance_sampling import policy_ratios
from .kl_estimators import SAMPLED_KL
from .ratios import LossInputs
from .token_selection import FILTERS


class TokenGrads(NamedTuple):
    """Gradient of a loss in the statistics of its tokens; None is zero."""

    logprob: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None


def is_token_level(config: LossConfig, *, has_sampling: bool) -> bool:
    """Tell if a token's loss depends on that token alone, so that `token_gradients` applies.

    has_sampling: sampling_logprob is given.
    """
    return (
        config.ratio_level == "token"
        and config.policy_term.token_level
        and not (has_sampling and config.importance_level == "sequence")
        and config.kl_cov is None
        and not config.rejection
        and all(getattr(config, name) is None for name in FILTERS)
    )


def zero_advantage_has_zero_grad(config: LossConfig, *, per_sequence: bool) -> bool:
    """Tell if a token with advantage 0, and without an nll_weight, surely has gradient 0.

    per_sequence: all tokens of a sequence have the same advantage. If not, the term of one token
    may have a gradient in another token of the sequence, whose own advantage is 0.
    """
    spreads = config.ratio_level == "sequence" or config.policy_term.spreads_grad
    return (
        (per_sequence or not spreads)
        and not config.policy_term.has_penalty
        and not config.has_kl
        and not config.has_entropy_bonus
        and config.kl_cov is None
    )


def token_gradients(logprob: Tensor, inputs: LossInputs, config: LossConfig) -> TokenGrads:
    """Compute the gradient of the loss where `is_token_level` holds.

        loss = Σ weight·(policy + beta·KL) - entropy_weight·Σ entropy - Σ nll_weight·logprob

    The KL is estimated from inputs.ref_logprob; without it, it is the one over the vocabulary, and
    its gradient is returned as `kl`.
    """
    ratios = policy_ratios(logprob, inputs, config)
    grad = config.policy_term.grad(ratios)
    if ratios.importance is not None:
        grad = grad * ratios.importance
    if not config.policy_term.has_penalty:  # advantage 0: gradient 0, also of a NaN log-prob
        grad = torch.where(inputs.advantage == 0, 0.0, grad)
    entropy = kl = None
    if config.has_kl and inputs.ref_logprob is not None:
        estimator = SAMPLED_KL[config.kl_estimator]
        d_kl = estimator.grad(logprob - inputs.ref_logprob, ratios.log_ratio)
        grad = grad + config.beta * d_kl
    elif config.has_kl:
        kl = config.beta * inputs.weight
    if inputs.entropy_weight is not None:
        entropy = (-inputs.entropy_weight).expand_as(logprob)
    grad = inputs.weight * grad
    if inputs.nll_weight is not None:
        # Tokens outside of the loss mask, with a weight of 0, have this term alone.
        masked = inputs.weight == 0
        grad = torch.where(masked, 0.0, grad) - inputs.nll_weight
        entropy = None if entropy is None else torch.where(masked, 0.0, entropy)
    return TokenGrads(grad, entropy, kl)
