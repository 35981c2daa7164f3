"""One token's terms in the loss: the surrogates, the KL estimators, and their weighted sum.

A variant of the objective is an entry in one of the tables: a formula, and its slope beside it.
Everything is elementwise, so a chunk of tokens has the loss and the gradient that it has within its
batch, given the tokens' weights.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .objective import LossConfig

# exp(20) = 4.9e8: beyond any clip, and far from overflow in a product or a sum.
MAX_LOG_RATIO = 20.0


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


class Formula(NamedTuple):
    """A term of the loss as a function of its first argument, and its derivative.

    Autograd of `value` gives `slope` too; but it takes some fifty operations to say so, and a loss
    whose gradient is made chunk by chunk asks for each of them.
    """

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]


def saturated_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _saturated_exp_slope(log_ratio: Tensor, ratio: Tensor) -> Tensor:
    return torch.where(log_ratio.abs() <= MAX_LOG_RATIO, ratio, 0.0)


def _clip(ratio: Tensor, advantage: Tensor, config: "LossConfig") -> Tensor:
    """-min(r A, clip(r) A) is -A·r with r bounded on the side to which the advantage pushes it."""
    falling = ratio.clamp(min=1 - config.epsilon_low, max=_cap(config))
    rising = ratio.clamp(max=1 + config.epsilon_high)
    return -advantage * torch.where(advantage < 0, falling, rising)


def _clip_slope(ratio: Tensor, advantage: Tensor, config: "LossConfig") -> Tensor:
    falling = (ratio >= 1 - config.epsilon_low) & (ratio <= _cap(config))
    rising = ratio <= 1 + config.epsilon_high
    return torch.where(torch.where(advantage < 0, falling, rising), -advantage, 0.0)


def _cap(config: "LossConfig") -> float:
    return min(x for x in (config.delta, config.dual_clip, float("inf")) if x is not None)


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
    d_ratio = _saturated_exp_slope(log_ratio, ratio)
    product_rule = d_ratio * _k3(d) + ratio * _k3_slope(d)
    return torch.where((d_ratio != 0) & (d >= -MAX_LOG_RATIO), ratio * d, product_rule)


RATIO_LEVELS = ("token", "sequence")
# Of the ratio, the advantage and the config; the slope is d/d(ratio).
SURROGATES: dict[str, Formula] = {"clip": Formula(_clip, _clip_slope)}
# Of d = logprob - ref_logprob and the token's log-ratio, logprob - old_logprob; the slope is
# d/d(logprob), which both contain.
SAMPLED_KL: dict[str, Formula] = {
    "k1": Formula(lambda d, log_ratio: d, lambda d, log_ratio: torch.ones_like(d)),
    "k2": Formula(lambda d, log_ratio: d * d / 2, lambda d, log_ratio: d),
    "k3": Formula(lambda d, log_ratio: _k3(d), lambda d, log_ratio: _k3_slope(d)),
    "k3+": Formula(lambda d, log_ratio: _k3_plus(d), lambda d, log_ratio: d),
    "k3_corrected": Formula(
        lambda d, log_ratio: saturated_exp(log_ratio) * _k3(d), _k3_corrected_slope
    ),
    "abs": Formula(lambda d, log_ratio: d.abs(), lambda d, log_ratio: d.sign()),
}
VOCABULARY_KL = ("forward", "reverse")


def importance(constants: Constants, config: "LossConfig") -> Tensor:
    """The weight of a token that a sampler drew under log-probs of its own."""
    log_weight = constants.old_logprob - constants.sampling_logprob
    return saturated_exp(log_weight).clamp(max=config.importance_cap)


def token_terms(
    logprob: Tensor, kl: Tensor | None, ratio: Tensor, constants: Constants, config: "LossConfig"
) -> tuple[Tensor, Tensor | None]:
    """Each token's policy term and, where there is a reference, its KL.

    kl is given over the vocabulary, or None; then it is estimated where a ref_logprob is given.
    """
    policy = SURROGATES[config.surrogate].value(ratio, constants.advantage, config)
    if constants.sampling_logprob is not None:
        policy = policy * importance(constants, config)
    if constants.ref_logprob is not None:
        log_ratio = logprob - constants.old_logprob
        kl = SAMPLED_KL[config.kl_estimator].value(logprob - constants.ref_logprob, log_ratio)
    return policy, kl


def weighted_sum(
    policy: Tensor,
    kl: Tensor | None,
    entropy: Tensor | None,
    constants: Constants,
    config: "LossConfig",
) -> Tensor:
    """Σ weight·(policy + beta·KL) - entropy_weight·Σ entropy: the loss, or a chunk's part of it."""
    term = policy if config.beta == 0 else policy + config.beta * kl
    loss = (constants.weight * term).sum()
    if constants.entropy_weight is not None:
        loss = loss - constants.entropy_weight * entropy.sum()
    return loss


class Slopes(NamedTuple):
    """The gradient of a loss in the statistics of its tokens; None is zero."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def loss_slopes(logprob: Tensor, constants: Constants, config: "LossConfig") -> Slopes:
    """The gradient of `weighted_sum` for a token-level ratio, without autograd.

    Of the kl where it is over the vocabulary: where no ref_logprob is given.
    """
    constants = constants.with_old(logprob)
    log_ratio = logprob - constants.old_logprob
    ratio = saturated_exp(log_ratio)
    slope = SURROGATES[config.surrogate].slope(ratio, constants.advantage, config)
    slope = slope * _saturated_exp_slope(log_ratio, ratio)
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
