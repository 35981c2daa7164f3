"""The surrogates: what is minimised for each sampled token, as a function of how the policy moved.

A surrogate is an entry of SURROGATES: its value, its slope beside it, and where its clip is active.
Those that read whole sequences have no slope: their gradient is left to autograd.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO, saturated_exp, saturated_exp_slope
from .sequences import Sequences

if TYPE_CHECKING:
    from .config import LossConfig

LEAST_LOG_WEIGHT = math.log(1e-8)  # of VESPO's weight of a sequence


class Moved(NamedTuple):
    """Sampled tokens, and how far the policy has moved on them since the old one."""

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
        return saturated_exp_slope(self.log_ratio, self.ratio)

    @property
    def shift(self) -> Tensor:
        """Change of the token's probability."""
        return self.logprob.exp() - self.old_logprob.exp()


Term = Callable[[Moved, "LossConfig"], Tensor]
Flags = tuple[Tensor, Tensor]


def _never(moved: Moved, config: "LossConfig") -> Flags:
    nowhere = torch.zeros_like(moved.advantage, dtype=torch.bool)
    return nowhere, nowhere


class Surrogate(NamedTuple):
    """A term of the loss per token; `slope` is d/d(logprob) at token level.

    `clipped`: where its clip holds the policy back, from below (A < 0) and from above (A > 0).
    """

    value: Term
    slope: Term | None
    clipped: Callable[[Moved, "LossConfig"], Flags] = _never

    @property
    def of_sequences(self) -> bool:
        """Whether a token's term depends on the rest of its sequence."""
        return self.slope is None


def _beyond(x: Tensor, lowest: float, highest: float, advantage: Tensor) -> Flags:
    return (x < lowest) & (advantage < 0), (x > highest) & (advantage > 0)


def _clip(moved: Moved, config: "LossConfig") -> Tensor:
    """-min(r A, clip(r) A) is -A·r with r bounded on the side to which the advantage pushes it."""
    falling = moved.ratio.clamp(min=1 - config.epsilon_low, max=two_sided_cap(config))
    rising = moved.ratio.clamp(max=1 + config.epsilon_high)
    return -moved.advantage * torch.where(moved.advantage < 0, falling, rising)


def _clip_slope(moved: Moved, config: "LossConfig") -> Tensor:
    ratio, advantage = moved.ratio, moved.advantage
    falling = (ratio >= 1 - config.epsilon_low) & (ratio <= two_sided_cap(config))
    rising = ratio <= 1 + config.epsilon_high
    inside = torch.where(advantage < 0, falling, rising)
    return torch.where(inside, -advantage, 0.0) * moved.d_ratio


def _clip_flags(moved: Moved, config: "LossConfig") -> Flags:
    lowest, highest = 1 - config.epsilon_low, 1 + config.epsilon_high
    return _beyond(moved.ratio, lowest, highest, moved.advantage)


def two_sided_cap(config: "LossConfig") -> float:
    return min(x for x in (config.delta, config.dual_clip, math.inf) if x is not None)


def _sapo(moved: Moved, config: "LossConfig") -> Tensor:
    """-A·(4/τ)·σ(τ(r - 1)): the slope in r is A at r = 1, and fades on both sides."""
    tau = _tau(moved, config)
    return -moved.advantage * torch.sigmoid(tau * (moved.ratio - 1)) * 4 / tau


def _sapo_slope(moved: Moved, config: "LossConfig") -> Tensor:
    gate = torch.sigmoid(_tau(moved, config) * (moved.ratio - 1))
    return -moved.advantage * 4 * gate * (1 - gate) * moved.d_ratio


def _tau(moved: Moved, config: "LossConfig") -> Tensor:
    return _either(moved.advantage > 0, config.tau_positive, config.tau_negative, moved.advantage)


def _either(condition: Tensor, x: float, other: float, like: Tensor) -> Tensor:
    """In the dtype of `like`: of two numbers torch.where makes fp32."""
    return torch.where(condition, torch.full_like(like, x), other)


# -s(w)·A·logprob, for three weights w: the gradient of a policy that w reweights.


def _scored(weight: Term) -> tuple[Term, Term]:
    """The value and the slope of a term whose weight is not differentiated."""

    def slope(moved: Moved, config: "LossConfig") -> Tensor:
        return -(weight(moved, config) * moved.advantage).detach()

    return lambda moved, config: slope(moved, config) * moved.logprob, slope


def _capped(moved: Moved, config: "LossConfig") -> Tensor:
    return moved.ratio.clamp(max=config.ratio_cap)


def _cispo_flags(moved: Moved, config: "LossConfig") -> Flags:
    return _beyond(moved.ratio, -math.inf, config.ratio_cap, moved.advantage)


def _trusted(moved: Moved, config: "LossConfig") -> Tensor:
    """DPPO's: nothing where the probability has already moved too far the way A pushes it."""
    shift = moved.shift
    inside = torch.where(
        moved.advantage > 0, shift <= config.epsilon_high, shift >= -config.epsilon_low
    )
    return torch.where(inside, _capped(moved, config), 0.0)


def _dppo_flags(moved: Moved, config: "LossConfig") -> Flags:
    return _beyond(moved.shift, -config.epsilon_low, config.epsilon_high, moved.advantage)


def sequence_gamma(moved: Moved, config: "LossConfig") -> Tensor:
    """VESPO's φ(w) = e^λ w^k e^(-λw), 1 at w = 1, of the probability ratio w of whole sequences."""
    bounded = moved.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if moved.importance is not None:
        bounded = bounded + moved.importance.log().clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
    log_weight = moved.sequences.sum(bounded).clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
    rising = moved.advantage >= 0
    k = _either(rising, config.k_positive, config.k_negative, log_weight)
    decay = _either(rising, config.lambda_positive, config.lambda_negative, log_weight)
    return (decay + k * log_weight - decay * log_weight.exp()).exp()


def _gmpo(moved: Moved, config: "LossConfig") -> Tensor:
    """-A times the geometric mean of the sequence's ratios, each bounded as "clip" does in r."""
    log_ratio, advantage = moved.log_ratio, moved.advantage
    rising, falling = log_ratio.clamp(max=config.epsilon_high), log_ratio.clamp(-config.epsilon_low)
    bounded = torch.where(advantage > 0, rising, torch.where(advantage < 0, falling, log_ratio))
    return -advantage * saturated_exp(moved.sequences.mean(bounded))


def _gmpo_flags(moved: Moved, config: "LossConfig") -> Flags:
    return _beyond(moved.log_ratio, -config.epsilon_low, config.epsilon_high, moved.advantage)


SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(_clip, _clip_slope, _clip_flags),
    "ratio": Surrogate(
        lambda moved, config: -moved.advantage * moved.ratio,
        lambda moved, config: -moved.advantage * moved.d_ratio,
    ),
    "cispo": Surrogate(*_scored(_capped), _cispo_flags),
    "sapo": Surrogate(_sapo, _sapo_slope),
    "dppo": Surrogate(*_scored(_trusted), _dppo_flags),
    "reinforce": Surrogate(*_scored(lambda moved, config: torch.ones_like(moved.advantage))),
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
