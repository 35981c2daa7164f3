"""Policy term of every objective, one formula per function, and the bounds that clip it.

r is the ratio at config.ratio_level, l = logprob - old_logprob, A the advantage; s() stops the
gradient. Every function returns the quantity to minimise, [sequences, longest]. Numbers are arXiv
ids.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reference.losses.ratios import (
    clamp,
    importance_weight,
    log_ratio,
    policy_ratio,
    saturated_exp,
)
from reference.losses.sequences import Tokens, sequence_mean, sequence_sum


def clip(tokens: Tokens, config: Any) -> Tensor:
    """-min(min(r, delta)·A, clip(r, 1 - epsilon_low, 1 + epsilon_high)·A).

    PPO (1707.06347), GRPO (2402.03300); two epsilons: 2503.14476; delta: 2505.07291.
    dual_clip (1912.09729) bounds the loss by dual_clip·|A| for A < 0.
    """
    r, advantage = policy_ratio(tokens, config.ratio_level), tokens.advantage
    capped = r if config.delta is None else clamp(r, high=config.delta)
    clipped = clamp(r, 1 - config.epsilon_low, 1 + config.epsilon_high)
    loss = -torch.minimum(capped * advantage, clipped * advantage)
    if config.dual_clip is not None:
        ceiling = config.dual_clip * advantage.abs()
        loss = torch.where((advantage < 0) & (loss > ceiling), ceiling, loss)
    return loss


def ratio(tokens: Tokens, config: Any) -> Tensor:
    """-r·A."""
    return -policy_ratio(tokens, config.ratio_level) * tokens.advantage


def cispo(tokens: Tokens, config: Any) -> Tensor:
    """-s(clip(r, ratio_floor, ratio_cap))·A·logprob (2506.13585, without a floor)."""
    r = policy_ratio(tokens, config.ratio_level)
    weight = r.clamp(config.ratio_floor, config.ratio_cap)
    return -weight.detach() * tokens.advantage * tokens.logprob


def sapo(tokens: Tokens, config: Any) -> Tensor:
    """-A·(4/τ)·sigmoid(τ(r - 1)), τ = tau_positive for A > 0, else tau_negative (2511.20347)."""
    r, advantage = policy_ratio(tokens, config.ratio_level), tokens.advantage
    tau = _choose(advantage > 0, config.tau_positive, config.tau_negative, like=r)
    return -advantage * (4 / tau) * torch.sigmoid(tau * (r - 1))


def dppo(tokens: Tokens, config: Any) -> Tensor:
    """-s(min(r, ratio_cap)·trusted)·A·logprob (2602.04879, binary total variation).

    trusted, with p the token's probability: p - p_old <= epsilon_high for A > 0, else
    p - p_old >= -epsilon_low.
    """
    return _score_of_trusted(tokens, config, prob_change(tokens))


def dppo_kl(tokens: Tokens, config: Any) -> Tensor:
    """Compute `dppo` with `binary_kl` in place of p - p_old (2602.04879, binary KL)."""
    return _score_of_trusted(tokens, config, binary_kl(tokens))


def _score_of_trusted(tokens: Tokens, config: Any, change: Tensor) -> Tensor:
    trusted = torch.where(
        tokens.advantage > 0, change <= config.epsilon_high, change >= -config.epsilon_low
    )
    r = policy_ratio(tokens, config.ratio_level)
    weight = torch.where(trusted, r.clamp(max=config.ratio_cap), 0.0)
    return -weight.detach() * tokens.advantage * tokens.logprob


def binary_kl(tokens: Tokens) -> Tensor:
    """KL of (p_old, 1 - p_old) to (p, 1 - p), negative for p < p_old; a constant.

    1e-8 is added to both terms of the quotient (1 - p_old) / (1 - p).
    """
    new, old = tokens.logprob.detach(), tokens.old_logprob
    rest, old_rest = ((1 - x.exp()).clamp(min=0) for x in (new, old))
    kl = old.exp() * (old - new) + old_rest * torch.log((old_rest + 1e-8) / (rest + 1e-8))
    kl = kl.clamp(min=0)  # against rounding
    return torch.where(new < old, -kl, kl)


def dro(tokens: Tokens, config: Any) -> Tensor:
    """-A·logprob + proximal_coef·l²/2 (2405.19107, 2501.12599)."""
    return config.proximal_coef * log_ratio(tokens) ** 2 / 2 - tokens.advantage * tokens.logprob


def topr(tokens: Tokens, config: Any) -> Tensor:
    """-A·logprob for A > 0, else -s(min(r, ratio_cap))·A·logprob (2503.14286)."""
    r = policy_ratio(tokens, config.ratio_level)
    weight = torch.where(tokens.advantage > 0, 1.0, r.clamp(max=config.ratio_cap))
    return -weight.detach() * tokens.advantage * tokens.logprob


def rollout_is(tokens: Tokens, config: Any) -> Tensor:
    """-s(r)·A·logprob where 1 - epsilon_low < r < 1 + epsilon_high, else 0 (2602.15763).

    The sampler takes the place of the old policy.
    """
    r = policy_ratio(tokens, config.ratio_level).detach()
    inside = (r > 1 - config.epsilon_low) & (r < 1 + config.epsilon_high)
    return -torch.where(inside, r, 0.0) * tokens.advantage * tokens.logprob


def prob_change(tokens: Tokens) -> Tensor:
    """p - p_old, a constant."""
    return tokens.logprob.detach().exp() - tokens.old_logprob.exp()


def reinforce(tokens: Tokens, config: Any) -> Tensor:
    """-A·logprob; its token mean is GPG (2504.02546)."""
    return -tokens.advantage * tokens.logprob


def vespo(tokens: Tokens, config: Any) -> Tensor:
    """-φ·A·logprob, φ = `vespo_weight` (2602.10693)."""
    return -vespo_weight(tokens, config) * tokens.advantage * tokens.logprob


def vespo_weight(tokens: Tokens, config: Any) -> Tensor:
    """φ = exp(λ + k·ln w - λ·w), a constant, 1 at w = 1; k and λ depend on A >= 0 or A < 0.

    ln w is the sum over the sequence of l, clamped to ±20, plus the sum of the logarithms of the
    importance weights, each clamped to [ln 1e-8, 20]; ln w itself is clamped to [ln 1e-8, 20].
    """
    lowest = math.log(1e-8)
    log_w = sequence_sum(log_ratio(tokens).clamp(-20, 20), tokens.mask)
    importance = importance_weight(tokens, config)
    if importance is not None:
        log_w = log_w + sequence_sum(importance.log().clamp(lowest, 20), tokens.mask)
    log_w = log_w.clamp(lowest, 20).detach()
    positive = tokens.advantage >= 0
    k = _choose(positive, config.k_positive, config.k_negative, like=log_w)
    rate = _choose(positive, config.lambda_positive, config.lambda_negative, like=log_w)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def gmpo(tokens: Tokens, config: Any) -> Tensor:
    """-A·exp(mean over the sequence of b), for every token of the sequence (2507.20673).

    b = min(l, epsilon_high) for A > 0, max(l, -epsilon_low) for A < 0, l for A = 0.
    """
    b, advantage = log_ratio(tokens), tokens.advantage
    b = torch.where(advantage > 0, clamp(b, high=config.epsilon_high), b)
    b = torch.where(advantage < 0, clamp(b, low=-config.epsilon_low), b)
    return -advantage * saturated_exp(sequence_mean(b, tokens.mask))


def ipo(tokens: Tokens, config: Any) -> Tensor:
    """-r·A where -epsilon_low <= p - p_old <= epsilon_high, else 0; plus sampler_penalty·l².

    The sampler takes the place of the old policy. INTELLECT Policy Optimization (prime-rl).
    """
    change = prob_change(tokens)
    near = (change >= -config.epsilon_low) & (change <= config.epsilon_high)
    policy = torch.where(near, -policy_ratio(tokens, "token") * tokens.advantage, 0.0)
    return policy + config.sampler_penalty * log_ratio(tokens) ** 2


SURROGATES: dict[str, Callable[[Tokens, Any], Tensor]] = {
    function.__name__: function
    for function in (
        *(clip, ratio, cispo, sapo, dppo, reinforce, vespo, gmpo, ipo, dppo_kl, dro, topr),
        rollout_is,
    )
}

# Surrogates for which the sampler takes the place of the old policy.
RELATIVE_TO_SAMPLER = ("ipo", "rollout_is")


def clipped(tokens: Tokens, config: Any) -> tuple[Tensor, Tensor]:
    """(low, high), bool: tokens with A < 0 below the lower bound, with A > 0 above the upper.

    A surrogate that is not listed here clips nothing.
    """
    low = high = torch.zeros_like(tokens.mask)
    if config.surrogate == "clip":
        r = policy_ratio(tokens, config.ratio_level)
        low, high = r < 1 - config.epsilon_low, r > 1 + config.epsilon_high
    elif config.surrogate == "cispo":
        r = policy_ratio(tokens, config.ratio_level)
        low, high = r < config.ratio_floor, r > config.ratio_cap
    elif config.surrogate in ("dppo", "dppo_kl", "gmpo"):
        measure = {"dppo": prob_change, "dppo_kl": binary_kl, "gmpo": log_ratio}
        x = measure[config.surrogate](tokens)
        low, high = x < -config.epsilon_low, x > config.epsilon_high
    elif config.surrogate == "ipo":
        change = prob_change(tokens)
        return change < -config.epsilon_low, change > config.epsilon_high
    elif config.surrogate == "rollout_is":
        r = policy_ratio(tokens, config.ratio_level)
        return r <= 1 - config.epsilon_low, r >= 1 + config.epsilon_high
    return low & (tokens.advantage < 0), high & (tokens.advantage > 0)


def _choose(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """Return `yes` or `no` per token in the dtype of `like`; where() of two floats gives fp32."""
    return torch.where(condition, torch.full_like(like, yes), torch.full_like(like, no))
