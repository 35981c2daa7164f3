"""The policy term of every objective, one formula per function, and where its bound cuts.

r is the ratio at config.ratio_level, l = logprob - old per token, A the advantage, s() stops the
gradient. Every function returns what is minimised, [sequences, longest].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reference.losses.ratios import importance_weight, log_ratio, policy_ratio, saturated_exp
from reference.losses.sequences import Tokens, sequence_mean, sequence_sum


def clip(tokens: Tokens, config: Any) -> Tensor:
    """-min(min(r, delta)·A, clip(r, 1 - epsilon_low, 1 + epsilon_high)·A).

    Where A < 0: at most dual_clip·|A|. Papers: 1707.06347, 2402.03300; 2503.14476 for two epsilons,
    2505.07291 for delta, 1912.09729 for dual_clip.
    """
    r, advantage = policy_ratio(tokens, config.ratio_level), tokens.advantage
    capped = r if config.delta is None else r.clamp(max=config.delta)
    clipped = r.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    loss = -torch.minimum(capped * advantage, clipped * advantage)
    if config.dual_clip is not None:
        ceiling = config.dual_clip * advantage.abs()
        loss = torch.where((advantage < 0) & (loss > ceiling), ceiling, loss)
    return loss


def ratio(tokens: Tokens, config: Any) -> Tensor:
    """-r·A."""
    return -policy_ratio(tokens, config.ratio_level) * tokens.advantage


def cispo(tokens: Tokens, config: Any) -> Tensor:
    """-s(min(r, ratio_cap))·A·logprob. Paper: 2506.13585."""
    weight = policy_ratio(tokens, config.ratio_level).clamp(max=config.ratio_cap)
    return -weight.detach() * tokens.advantage * tokens.logprob


def sapo(tokens: Tokens, config: Any) -> Tensor:
    """-A·(4/τ)·sigmoid(τ(r - 1)), τ = tau_positive where A > 0, else tau_negative: 2511.20347."""
    r, advantage = policy_ratio(tokens, config.ratio_level), tokens.advantage
    tau = _choose(advantage > 0, config.tau_positive, config.tau_negative, like=r)
    return -advantage * (4 / tau) * torch.sigmoid(tau * (r - 1))


def dppo(tokens: Tokens, config: Any) -> Tensor:
    """-s(min(r, ratio_cap)·trusted)·A·logprob. Paper: 2602.04879, the binary total variation.

    trusted, p the token's probability: p - p_old <= epsilon_high where A > 0, else
    p - p_old >= -epsilon_low.
    """
    r, change = policy_ratio(tokens, config.ratio_level), probability_change(tokens)
    trusted = torch.where(
        tokens.advantage > 0, change <= config.epsilon_high, change >= -config.epsilon_low
    )
    weight = torch.where(trusted, r.clamp(max=config.ratio_cap), 0.0)
    return -weight.detach() * tokens.advantage * tokens.logprob


def probability_change(tokens: Tokens) -> Tensor:
    """p - p_old, p = e^logprob, a constant."""
    return tokens.logprob.detach().exp() - tokens.old.exp()


def reinforce(tokens: Tokens, config: Any) -> Tensor:
    """-A·logprob. GPG, 2504.02546, is its token mean."""
    return -tokens.advantage * tokens.logprob


def vespo(tokens: Tokens, config: Any) -> Tensor:
    """-φ·A·logprob, φ a constant: `vespo_weight`. Paper: 2602.10693."""
    return -vespo_weight(tokens, config) * tokens.advantage * tokens.logprob


def vespo_weight(tokens: Tokens, config: Any) -> Tensor:
    """φ = exp(λ + k·ln w - λ·w), which is 1 at w = 1; k and λ by A >= 0 or A < 0.

    ln w is the sequence's sum of l, each clamped to ±20, and of the logarithms of the importance
    weights where there are any; these, and ln w itself, are clamped to [ln 1e-8, 20].
    """
    lowest = math.log(1e-8)
    log_w = sequence_sum(log_ratio(tokens).clamp(-20, 20), tokens.keep)
    importance = importance_weight(tokens, config)
    if importance is not None:
        log_w = log_w + sequence_sum(importance.log().clamp(lowest, 20), tokens.keep)
    log_w = log_w.clamp(lowest, 20).detach()
    positive = tokens.advantage >= 0
    k = _choose(positive, config.k_positive, config.k_negative, like=log_w)
    rate = _choose(positive, config.lambda_positive, config.lambda_negative, like=log_w)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def gmpo(tokens: Tokens, config: Any) -> Tensor:
    """-A·exp(mean over the sequence of b), at every token of the sequence. Paper: 2507.20673.

    b = min(l, epsilon_high) where A > 0, max(l, -epsilon_low) where A < 0, l where A = 0.
    """
    own, advantage = log_ratio(tokens), tokens.advantage
    b = torch.where(advantage > 0, own.clamp(max=config.epsilon_high), own)
    b = torch.where(advantage < 0, own.clamp(min=-config.epsilon_low), b)
    return -advantage * saturated_exp(sequence_mean(b, tokens.keep))


SURROGATES: dict[str, Callable[[Tokens, Any], Tensor]] = {
    "clip": clip,
    "ratio": ratio,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "reinforce": reinforce,
    "vespo": vespo,
    "gmpo": gmpo,
}


def clipped(tokens: Tokens, config: Any) -> tuple[Tensor, Tensor]:
    """(low, high), bool: tokens with A < 0 below the lower bound, with A > 0 above the upper."""
    r = policy_ratio(tokens, config.ratio_level)
    nowhere = torch.zeros_like(tokens.keep)
    low, high = {
        "clip": (r < 1 - config.epsilon_low, r > 1 + config.epsilon_high),
        "cispo": (nowhere, nowhere if config.ratio_cap is None else r > config.ratio_cap),
        "dppo": _outside(probability_change(tokens), config),
        "gmpo": _outside(log_ratio(tokens), config),
    }.get(config.surrogate, (nowhere, nowhere))
    return low & (tokens.advantage < 0), high & (tokens.advantage > 0)


def _outside(x: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return x < -config.epsilon_low, x > config.epsilon_high


def _choose(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """`yes` or `no` at every token, in the dtype of `like`: where() of two floats makes fp32."""
    return torch.where(condition, torch.full_like(like, yes), torch.full_like(like, no))
