"""Surrogates: the policy term of the loss, one class per objective.

A class holds the formula, its paper, the settings that it reads (its fields), its value, its
gradient and the tokens that it clips. r is the ratio of the policy to the old policy at the
config's ratio_level, A the advantage, s() a stop-gradient. Every value is minimised.

To add an objective: write a class, enter it in SURROGATES, give `surrogate_grad` in
backends/triton/row_math.py its gradient if it is token-level, and add its name, its settings and a
named constructor to LossConfig.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO, PolicyRatios, at_least, at_most, saturated_exp

Flags = tuple[Tensor, Tensor]


class KernelForm(NamedTuple):
    """Branch of `surrogate_grad` in backends/triton/row_math.py, and the numbers that it reads."""

    name: str
    lowest: float
    highest: float
    cap: float


@dataclass(frozen=True)
class Surrogate:
    """Policy term of a token. Its fields are the fields of LossConfig that it reads.

    A token-level surrogate depends on the token alone; its gradient has a closed form, here and in
    the row kernel. The gradient of any other is left to autograd.
    """

    token_level: ClassVar[bool] = True
    spreads_grad: ClassVar[bool] = False  # one token's term has a gradient in other tokens
    has_penalty: ClassVar[bool] = False  # the gradient may be nonzero where A = 0
    relative_to_sampler: ClassVar[bool] = False  # the sampler takes the place of the old policy
    applies_importance: ClassVar[bool] = False  # `value` contains the importance weight
    only_token_ratio: ClassVar[str] = ""  # why ratio_level must be "token"; "": it need not be

    def value(self, ratios: PolicyRatios) -> Tensor:
        raise NotImplementedError

    def grad(self, ratios: PolicyRatios) -> Tensor:
        """Derivative of `value` in the log-prob, for ratio_level "token"."""
        raise NotImplementedError

    def clipped(self, ratios: PolicyRatios) -> Flags:
        """Find the tokens that a bound holds back: from below (A < 0) and from above (A > 0)."""
        none = torch.zeros_like(ratios.advantage, dtype=torch.bool)
        return none, none

    def kernel_form(self) -> KernelForm:
        raise NotImplementedError


def _beyond(x: Tensor, lowest: float, highest: float, advantage: Tensor) -> Flags:
    return (x < lowest) & (advantage < 0), (x > highest) & (advantage > 0)


def _choose(condition: Tensor, x: float, other: float, like: Tensor) -> Tensor:
    """Select x or other in the dtype of `like`; torch.where of two numbers gives fp32."""
    return torch.where(condition, torch.zeros_like(like) + x, other)


@dataclass(frozen=True)
class Clip(Surrogate):
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A); where A < 0, r is capped first.

    It equals -A·r with r bounded on the side to which the advantage pushes it. The cap is `delta`
    or `dual_clip`, whichever is lower.

    PPO (arXiv:1707.06347), GRPO (2402.03300); two epsilons 2503.14476, delta 2505.07291,
    dual_clip 1912.09729.
    """

    epsilon_low: float
    epsilon_high: float
    delta: float | None
    dual_clip: float | None

    def cap(self) -> float:
        if self.delta is None or self.dual_clip is None:
            given = self.dual_clip if self.delta is None else self.delta
            return math.inf if given is None else given
        if isinstance(self.delta, Tensor):  # in a compiled function
            return cast(Any, at_most(self.delta, self.dual_clip))
        return min(self.delta, self.dual_clip)

    def value(self, ratios: PolicyRatios) -> Tensor:
        falling = at_most(at_least(ratios.ratio, 1 - self.epsilon_low), self.cap())
        rising = at_most(ratios.ratio, 1 + self.epsilon_high)
        return -ratios.advantage * torch.where(ratios.advantage < 0, falling, rising)

    def grad(self, ratios: PolicyRatios) -> Tensor:
        ratio, advantage = ratios.ratio, ratios.advantage
        falling = (ratio >= 1 - self.epsilon_low) & (ratio <= self.cap())
        rising = ratio <= 1 + self.epsilon_high
        inside = torch.where(advantage < 0, falling, rising)
        return torch.where(inside, -advantage, 0.0) * ratios.d_ratio

    def clipped(self, ratios: PolicyRatios) -> Flags:
        lowest, highest = 1 - self.epsilon_low, 1 + self.epsilon_high
        return _beyond(ratios.ratio, lowest, highest, ratios.advantage)

    def kernel_form(self) -> KernelForm:
        return KernelForm("clip", 1 - self.epsilon_low, 1 + self.epsilon_high, self.cap())


class Ratio(Surrogate):
    """-r A, without a clip."""

    def value(self, ratios: PolicyRatios) -> Tensor:
        return -ratios.advantage * ratios.ratio

    def grad(self, ratios: PolicyRatios) -> Tensor:
        return -ratios.advantage * ratios.d_ratio

    def kernel_form(self) -> KernelForm:
        return KernelForm("clip", -math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class Gmpo(Surrogate):
    """-A times the geometric mean of the sequence's ratios, each bounded on one side.

    The bound of a log-ratio is epsilon_high where A > 0 and -epsilon_low where A < 0
    (arXiv:2507.20673).
    """

    epsilon_low: float
    epsilon_high: float
    token_level = False
    spreads_grad = True
    only_token_ratio = "averages over the sequence itself"

    def value(self, ratios: PolicyRatios) -> Tensor:
        log_ratio, advantage = ratios.log_ratio, ratios.advantage
        rising = at_most(log_ratio, self.epsilon_high)
        falling = at_least(log_ratio, -self.epsilon_low)
        bounded = torch.where(advantage > 0, rising, torch.where(advantage < 0, falling, log_ratio))
        return -advantage * saturated_exp(ratios.sequences.mean(bounded))

    def clipped(self, ratios: PolicyRatios) -> Flags:
        return _beyond(ratios.log_ratio, -self.epsilon_low, self.epsilon_high, ratios.advantage)


@dataclass(frozen=True)
class Sapo(Surrogate):
    """-A (4/τ) σ(τ (r - 1)): its derivative in r is -A at r = 1 and fades on both sides.

    τ is tau_positive where A > 0, else tau_negative (arXiv:2511.20347).
    """

    tau_positive: float
    tau_negative: float

    def tau(self, advantage: Tensor) -> Tensor:
        return _choose(advantage > 0, self.tau_positive, self.tau_negative, advantage)

    def value(self, ratios: PolicyRatios) -> Tensor:
        tau = self.tau(ratios.advantage)
        return -ratios.advantage * torch.sigmoid(tau * (ratios.ratio - 1)) * 4 / tau

    def grad(self, ratios: PolicyRatios) -> Tensor:
        gate = torch.sigmoid(self.tau(ratios.advantage) * (ratios.ratio - 1))
        return -ratios.advantage * 4 * gate * (1 - gate) * ratios.d_ratio

    def kernel_form(self) -> KernelForm:
        return KernelForm("sapo", self.tau_negative, self.tau_positive, 0.0)


class WeightedScore(Surrogate):
    """-s(weight) A logprob: the policy gradient of each token, times a constant."""

    def weight(self, ratios: PolicyRatios) -> Tensor:
        raise NotImplementedError

    def grad(self, ratios: PolicyRatios) -> Tensor:
        return -(self.weight(ratios) * ratios.advantage).detach()

    def value(self, ratios: PolicyRatios) -> Tensor:
        return self.grad(ratios) * ratios.logprob


class Reinforce(WeightedScore):
    """-A logprob (Williams, 1992)."""

    only_token_ratio = "has no ratio"

    def weight(self, ratios: PolicyRatios) -> Tensor:
        return torch.ones_like(ratios.advantage)

    def kernel_form(self) -> KernelForm:
        return KernelForm("score", 1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Cispo(WeightedScore):
    """-s(clip(r, ratio_floor, ratio_cap)) A logprob: no token loses its gradient.

    The paper clips from above only (arXiv:2506.13585).
    """

    ratio_floor: float
    ratio_cap: float

    def weight(self, ratios: PolicyRatios) -> Tensor:
        return ratios.ratio.clamp(self.ratio_floor, self.ratio_cap)

    def clipped(self, ratios: PolicyRatios) -> Flags:
        return _beyond(ratios.ratio, self.ratio_floor, self.ratio_cap, ratios.advantage)

    def kernel_form(self) -> KernelForm:
        return KernelForm("score", self.ratio_floor, 0.0, self.ratio_cap)


@dataclass(frozen=True)
class Topr(WeightedScore):
    """-A logprob where A > 0; -s(min(r, ratio_cap)) A logprob elsewhere.

    Right completions count in full, as in imitation; wrong ones no more than the policy still
    writes them (arXiv:2503.14286). The paper's ratio is that of the sequence, and its cap is 1.
    """

    ratio_cap: float

    def weight(self, ratios: PolicyRatios) -> Tensor:
        return torch.where(ratios.advantage > 0, 1.0, ratios.ratio.clamp(max=self.ratio_cap))

    def kernel_form(self) -> KernelForm:
        return KernelForm("topr", 0.0, 0.0, self.ratio_cap)


@dataclass(frozen=True)
class RolloutIs(WeightedScore):
    """-s(r) A logprob where 1 - epsilon_low < r < 1 + epsilon_high, else 0; r is to the sampler.

    sampling_logprob takes the place of old_logprob, as in `Ipo`. A token is dropped whatever the
    sign of A; `clipped` reports the dropped tokens, below and above (GLM-5, arXiv:2602.15763).
    """

    epsilon_low: float
    epsilon_high: float
    relative_to_sampler = True

    def weight(self, ratios: PolicyRatios) -> Tensor:
        return torch.where(torch.logical_or(*self.clipped(ratios)), 0.0, ratios.ratio)

    def clipped(self, ratios: PolicyRatios) -> Flags:
        ratio = ratios.ratio.detach()
        return ratio <= 1 - self.epsilon_low, ratio >= 1 + self.epsilon_high

    def kernel_form(self) -> KernelForm:
        return KernelForm("rollout_is", 1 - self.epsilon_low, 1 + self.epsilon_high, 0.0)


@dataclass(frozen=True)
class Dppo(WeightedScore):
    """-s(min(r, ratio_cap)) A logprob, or 0 where the token's probability changed too far.

    Too far: p - p_old is above epsilon_high where A > 0, or below -epsilon_low elsewhere. It is
    the binary total variation of arXiv:2602.04879.
    """

    epsilon_low: float
    epsilon_high: float
    ratio_cap: float
    only_token_ratio = "bounds each token's own probability"

    def change(self, ratios: PolicyRatios) -> Tensor:
        """Measure how far the token's probability moved; negative where it fell."""
        return ratios.prob_diff

    def weight(self, ratios: PolicyRatios) -> Tensor:
        change = self.change(ratios)
        beyond = torch.where(
            ratios.advantage > 0, change > self.epsilon_high, change < -self.epsilon_low
        )
        return torch.where(beyond, 0.0, ratios.ratio.clamp(max=self.ratio_cap))

    def clipped(self, ratios: PolicyRatios) -> Flags:
        return _beyond(self.change(ratios), -self.epsilon_low, self.epsilon_high, ratios.advantage)

    def kernel_form(self) -> KernelForm:
        return KernelForm("dppo", -self.epsilon_low, self.epsilon_high, self.ratio_cap)


class DppoKl(Dppo):
    """Dppo whose bounds are on KL(old‖policy) of the binary choice between the token and the rest.

        KL = q ln(q / p) + (1 - q) ln((1 - q + 1e-8) / (1 - p + 1e-8))

    q is the old probability of the token, p the new one. It counts as negative where the
    probability fell (arXiv:2602.04879).
    """

    def change(self, ratios: PolicyRatios) -> Tensor:
        logprob, old_logprob = ratios.logprob.detach(), ratios.old_logprob
        rest, old_rest = (-torch.expm1(x).clamp(max=0) for x in (logprob, old_logprob))
        token = old_logprob.exp() * (old_logprob - logprob)
        divergence = token + old_rest * ((old_rest + 1e-8) / (rest + 1e-8)).log()
        divergence = divergence.clamp(min=0)  # rounding makes that of equal policies negative
        return torch.where(logprob < old_logprob, -divergence, divergence)

    def kernel_form(self) -> KernelForm:
        return super().kernel_form()._replace(name="dppo_kl")


@dataclass(frozen=True)
class Vespo(WeightedScore):
    """-s(φ(w)) A logprob, φ(w) = e^λ w^k e^(-λw), w the sequence's probability ratio.

    φ(1) = 1. k and λ are chosen by the sign of A. The importance weights of the tokens are factors
    of w (arXiv:2602.10693).
    """

    k_positive: float
    lambda_positive: float
    k_negative: float
    lambda_negative: float
    token_level = False
    applies_importance = True
    only_token_ratio = "weighs whole sequences itself"

    def weight(self, ratios: PolicyRatios) -> Tensor:
        least = math.log(1e-8)
        log_weight = ratios.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if ratios.importance is not None:
            log_weight = log_weight + ratios.importance.log().clamp(least, MAX_LOG_RATIO)
        log_weight = ratios.sequences.sum(log_weight).clamp(least, MAX_LOG_RATIO)
        rising = ratios.advantage >= 0
        k = _choose(rising, self.k_positive, self.k_negative, log_weight)
        decay = _choose(rising, self.lambda_positive, self.lambda_negative, log_weight)
        return (decay + k * log_weight - decay * log_weight.exp()).exp()


@dataclass(frozen=True)
class Ipo(Surrogate):
    """-r A while the token's probability is near the sampler's, plus a penalty on every token.

        d     = p - p_sampler, the difference of the token's probability
        value = (-r A if -epsilon_low <= d <= epsilon_high else 0) + sampler_penalty·(ln r)²

    r is the ratio to the sampler, p / p_sampler: sampling_logprob takes the place of old_logprob,
    which is not read, and there is no other importance weight. r is differentiated; in the first
    term ln r saturates at ±20, in the penalty it does not. Whether a token is dropped does not
    depend on the sign of A. `clipped` reports the dropped tokens, below and above.

    INTELLECT Policy Optimization, the default loss of prime-rl (Prime Intellect, 2026).
    """

    epsilon_low: float
    epsilon_high: float
    sampler_penalty: float
    has_penalty = True
    relative_to_sampler = True
    only_token_ratio = "bounds each token's own probability"

    def value(self, ratios: PolicyRatios) -> Tensor:
        dropped = torch.logical_or(*self.clipped(ratios))
        policy = torch.where(dropped, 0.0, -ratios.advantage * ratios.ratio)
        return policy + self.sampler_penalty * ratios.log_ratio.square()

    def grad(self, ratios: PolicyRatios) -> Tensor:
        dropped = torch.logical_or(*self.clipped(ratios))
        policy = torch.where(dropped, 0.0, -ratios.advantage * ratios.d_ratio)
        return policy + 2 * self.sampler_penalty * ratios.log_ratio

    def clipped(self, ratios: PolicyRatios) -> Flags:
        prob_diff = ratios.prob_diff.detach()
        return prob_diff < -self.epsilon_low, prob_diff > self.epsilon_high

    def kernel_form(self) -> KernelForm:
        return KernelForm("ipo", -self.epsilon_low, self.epsilon_high, self.sampler_penalty)


@dataclass(frozen=True)
class Dro(Surrogate):
    """-A logprob + proximal_coef/2·(ln r)², on every token; ln r does not saturate.

    Direct Reward Optimisation (arXiv:2405.19107); Kimi-K1.5's objective (2501.12599).
    """

    proximal_coef: float
    has_penalty = True
    only_token_ratio = "compares each token with the old policy itself"

    def value(self, ratios: PolicyRatios) -> Tensor:
        penalty = self.proximal_coef / 2 * ratios.log_ratio.square()
        return penalty - ratios.advantage * ratios.logprob

    def grad(self, ratios: PolicyRatios) -> Tensor:
        return self.proximal_coef * ratios.log_ratio - ratios.advantage

    def kernel_form(self) -> KernelForm:
        return KernelForm("dro", 0.0, 0.0, self.proximal_coef)


SURROGATES: dict[str, type[Surrogate]] = {
    "clip": Clip,
    "ratio": Ratio,
    "gmpo": Gmpo,
    "cispo": Cispo,
    "sapo": Sapo,
    "dppo": Dppo,
    "reinforce": Reinforce,
    "vespo": Vespo,
    "ipo": Ipo,
    "dppo_kl": DppoKl,
    "dro": Dro,
    "topr": Topr,
    "rollout_is": RolloutIs,
}
