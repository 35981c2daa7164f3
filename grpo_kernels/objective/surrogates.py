"""The surrogates: what is minimised for each sampled token, as a function of how the policy ratios.

A surrogate is an entry of SURROGATES: its value, its grad beside it, and where its clip is active.
Those that read whole sequences have no grad: their gradient is left to autograd.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO, saturated_exp, saturated_exp_grad
from .sequences import Sequences

if TYPE_CHECKING:
    from .config import LossConfig

LEAST_LOG_WEIGHT = math.log(1e-8)  # of VESPO's weight of a sequence


class PolicyRatios(NamedTuple):
    """Sampled tokens, and how far the policy has ratios on them since the old one."""

    logprob: Tensor
    old_logprob: Tensor
    ratio: Tensor  # at the config's ratio_level, saturated
    advantage: Tensor
    importance: Tensor | None  # weight for a sampler with log-probs of its own
    sequences: Sequences | None  # None: of a part of a batch, where sequences do not matter

    @property
    def log_ratio(self) -> Tensor:
        """Each token's own, not saturated."""
        return self.logprob - self.old_logprob

    @property
    def d_ratio(self) -> Tensor:
        """d ratio / d logprob of a token-level ratio."""
        return saturated_exp_grad(self.log_ratio, self.ratio)

    @property
    def prob_diff(self) -> Tensor:
        """Change of the token's probability."""
        return self.logprob.exp() - self.old_logprob.exp()


Term = Callable[[PolicyRatios, "LossConfig"], Tensor]
Flags = tuple[Tensor, Tensor]


def _never(ratios: PolicyRatios, config: "LossConfig") -> Flags:
    nowhere = torch.zeros_like(ratios.advantage, dtype=torch.bool)
    return nowhere, nowhere


class Surrogate(NamedTuple):
    """A term of the loss per token; `grad` is d/d(logprob) at token level.

    `clipped`: where its clip holds the policy back, from below (A < 0) and from above (A > 0).
    """

    value: Term
    grad: Term | None
    clipped: Callable[[PolicyRatios, "LossConfig"], Flags] = _never

    @property
    def of_sequences(self) -> bool:
        """Whether a token's term depends on the rest of its sequence."""
        return self.grad is None


def _beyond(x: Tensor, lowest: float, highest: float, advantage: Tensor) -> Flags:
    return (x < lowest) & (advantage < 0), (x > highest) & (advantage > 0)


def _clip(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    """-min(r A, clip(r) A) is -A·r with r bounded on the side to which the advantage pushes it."""
    falling = ratios.ratio.clamp(min=1 - config.epsilon_low, max=two_sided_cap(config))
    rising = ratios.ratio.clamp(max=1 + config.epsilon_high)
    return -ratios.advantage * torch.where(ratios.advantage < 0, falling, rising)


def _clip_slope(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    ratio, advantage = ratios.ratio, ratios.advantage
    falling = (ratio >= 1 - config.epsilon_low) & (ratio <= two_sided_cap(config))
    rising = ratio <= 1 + config.epsilon_high
    inside = torch.where(advantage < 0, falling, rising)
    return torch.where(inside, -advantage, 0.0) * ratios.d_ratio


def _clip_flags(ratios: PolicyRatios, config: "LossConfig") -> Flags:
    lowest, highest = 1 - config.epsilon_low, 1 + config.epsilon_high
    return _beyond(ratios.ratio, lowest, highest, ratios.advantage)


def two_sided_cap(config: "LossConfig") -> float:
    return min(x for x in (config.delta, config.dual_clip, math.inf) if x is not None)


def _sapo(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    """-A·(4/τ)·σ(τ(r - 1)): the grad in r is A at r = 1, and fades on both sides."""
    tau = _tau(ratios, config)
    return -ratios.advantage * torch.sigmoid(tau * (ratios.ratio - 1)) * 4 / tau


def _sapo_slope(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    gate = torch.sigmoid(_tau(ratios, config) * (ratios.ratio - 1))
    return -ratios.advantage * 4 * gate * (1 - gate) * ratios.d_ratio


def _tau(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    return _either(ratios.advantage > 0, config.tau_positive, config.tau_negative, ratios.advantage)


def _either(condition: Tensor, x: float, other: float, like: Tensor) -> Tensor:
    """In the dtype of `like`: of two numbers torch.where makes fp32."""
    return torch.where(condition, torch.full_like(like, x), other)


# -s(w)·A·logprob, for three weights w: the gradient of a policy that w reweights.


def _scored(weight: Term) -> tuple[Term, Term]:
    """The value and the grad of a term whose weight is not differentiated."""

    def grad(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
        return -(weight(ratios, config) * ratios.advantage).detach()

    return lambda ratios, config: grad(ratios, config) * ratios.logprob, grad


def _capped(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    return ratios.ratio.clamp(max=config.ratio_cap)


def _cispo_flags(ratios: PolicyRatios, config: "LossConfig") -> Flags:
    return _beyond(ratios.ratio, -math.inf, config.ratio_cap, ratios.advantage)


def _trusted(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    """DPPO's: nothing where the probability has already ratios too far the way A pushes it."""
    prob_diff = ratios.prob_diff
    inside = torch.where(
        ratios.advantage > 0, prob_diff <= config.epsilon_high, prob_diff >= -config.epsilon_low
    )
    return torch.where(inside, _capped(ratios, config), 0.0)


def _dppo_flags(ratios: PolicyRatios, config: "LossConfig") -> Flags:
    return _beyond(ratios.prob_diff, -config.epsilon_low, config.epsilon_high, ratios.advantage)


def sequence_gamma(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    """VESPO's φ(w) = e^λ w^k e^(-λw), 1 at w = 1, of the probability ratio w of whole sequences."""
    bounded = ratios.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if ratios.importance is not None:
        bounded = bounded + ratios.importance.log().clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
    log_weight = ratios.sequences.sum(bounded).clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
    rising = ratios.advantage >= 0
    k = _either(rising, config.k_positive, config.k_negative, log_weight)
    decay = _either(rising, config.lambda_positive, config.lambda_negative, log_weight)
    return (decay + k * log_weight - decay * log_weight.exp()).exp()


def _gmpo(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    """-A times the geometric mean of the sequence's ratios, each bounded as "clip" does in r."""
    log_ratio, advantage = ratios.log_ratio, ratios.advantage
    rising, falling = log_ratio.clamp(max=config.epsilon_high), log_ratio.clamp(-config.epsilon_low)
    bounded = torch.where(advantage > 0, rising, torch.where(advantage < 0, falling, log_ratio))
    return -advantage * saturated_exp(ratios.sequences.mean(bounded))


def _gmpo_flags(ratios: PolicyRatios, config: "LossConfig") -> Flags:
    return _beyond(ratios.log_ratio, -config.epsilon_low, config.epsilon_high, ratios.advantage)


SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(_clip, _clip_slope, _clip_flags),
    "ratio": Surrogate(
        lambda ratios, config: -ratios.advantage * ratios.ratio,
        lambda ratios, config: -ratios.advantage * ratios.d_ratio,
    ),
    "cispo": Surrogate(*_scored(_capped), _cispo_flags),
    "sapo": Surrogate(_sapo, _sapo_slope),
    "dppo": Surrogate(*_scored(_trusted), _dppo_flags),
    "reinforce": Surrogate(*_scored(lambda ratios, config: torch.ones_like(ratios.advantage))),
    "vespo": Surrogate(_scored(sequence_gamma)[0], None),
    "gmpo": Surrogate(_gmpo, None, _gmpo_flags),
}


# The log-ratio that is exponentiated, at every token, from the tokens' own.
RATIO_LEVELS: dict[str, Callable[[Tensor, Sequences], Tensor]] = {
    "token": lambda log_ratio, sequences: log_ratio,
    "sequence": lambda log_ratio, sequences: sequences.mean(log_ratio),
    "sequence_token": lambda log_ratio, sequences: (
        sequences.mean(log_ratio).detach() + (log_ratio - log_ratio.detach())
    ),
}
