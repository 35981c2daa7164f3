"""One token's terms in the loss: the surrogates, the KL estimators, and their weighted sum.

A variant of the objective is an entry in one of the tables. Everything is elementwise, so a chunk
of tokens has the loss and the gradient that it has within its batch, given the tokens' weights.
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


def saturated_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clip(ratio: Tensor, advantage: Tensor, config: "LossConfig") -> Tensor:
    """-min(r A, clip(r) A) is -A·r with r bounded on the side to which the advantage pushes it."""
    cap = min(x for x in (config.delta, config.dual_clip, float("inf")) if x is not None)
    falling = ratio.clamp(min=1 - config.epsilon_low, max=cap)
    rising = ratio.clamp(max=1 + config.epsilon_high)
    return -advantage * torch.where(advantage < 0, falling, rising)


def _k3(d: Tensor) -> Tensor:
    d = d.clamp(min=-MAX_LOG_RATIO)  # on the other side e^(-d) only vanishes
    return torch.expm1(-d) + d


def _k3_plus(d: Tensor) -> Tensor:
    k2 = d * d / 2
    return _k3(d).detach() + (k2 - k2.detach())


RATIO_LEVELS = ("token", "sequence")
SURROGATES: dict[str, Callable[[Tensor, Tensor, "LossConfig"], Tensor]] = {"clip": _clip}
# From d = logprob - ref_logprob and the token's log-ratio, logprob - old_logprob.
SAMPLED_KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda d, log_ratio: d,
    "k2": lambda d, log_ratio: d * d / 2,
    "k3": lambda d, log_ratio: _k3(d),
    "k3+": lambda d, log_ratio: _k3_plus(d),
    "k3_corrected": lambda d, log_ratio: saturated_exp(log_ratio) * _k3(d),
    "abs": lambda d, log_ratio: d.abs(),
}
VOCABULARY_KL = ("forward", "reverse")


def token_terms(
    logprob: Tensor, kl: Tensor | None, ratio: Tensor, constants: Constants, config: "LossConfig"
) -> tuple[Tensor, Tensor | None]:
    """Each token's policy term and, where there is a reference, its KL.

    kl is given over the vocabulary, or None; then it is estimated where a ref_logprob is given.
    """
    policy = SURROGATES[config.surrogate](ratio, constants.advantage, config)
    if constants.sampling_logprob is not None:
        importance = saturated_exp(constants.old_logprob - constants.sampling_logprob)
        policy = policy * importance.clamp(max=config.importance_cap)
    if constants.ref_logprob is not None:
        log_ratio = logprob - constants.old_logprob
        kl = SAMPLED_KL[config.kl_estimator](logprob - constants.ref_logprob, log_ratio)
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
