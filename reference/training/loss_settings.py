"""The losses by name, and what a loss is made of as settings of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

# What each named loss sets in LossConfig; everything else keeps its default there.
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "one_shot": {"entropy_coef": 0.001},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "fixed_length"},
    "dapo": {"aggregation": "token_mean", "epsilon_high": 0.28},
    "gspo": {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "gspo_token": {"ratio_level": "sequence_token", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "luspo": {
        "ratio_level": "sequence",
        "epsilon_low": 2e-3,
        "epsilon_high": 2.5e-3,
        "aggregation": "sequence_sum_mean",
    },
    "gmpo": {"surrogate": "gmpo", "epsilon_low": 0.4, "epsilon_high": 0.4},
    "cispo": {"surrogate": "cispo", "ratio_cap": 5.0, "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo"},
    "vespo": {"surrogate": "vespo", "aggregation": "token_mean"},
    "dppo": {
        "surrogate": "dppo",
        "epsilon_low": 0.15,
        "epsilon_high": 0.15,
        "ratio_cap": 20.0,
        "aggregation": "token_mean",
    },
    "reinforce": {"surrogate": "reinforce", "aggregation": "sequence_sum_mean"},
    "gpg": {"surrogate": "reinforce", "aggregation": "token_mean"},
    "two_sided": {"delta": 4.0},
    "icepop": {
        "importance_mode": "mask",
        "importance_floor": 0.5,
        "importance_cap": 5.0,
        "aggregation": "token_mean",
    },
    "clip_covariance": {"clip_cov": 2e-4, "aggregation": "token_mean"},
    "kl_covariance": {"surrogate": "ratio", "kl_cov": 2e-4, "aggregation": "token_mean"},
}


@dataclass(frozen=True)
class LossSettings:
    """--loss names an objective; a flag below it that is not None replaces what that name sets.

    r is the ratio of the new to the old policy, A the advantage; in brackets the number at arXiv:
      grpo             clipped r, mean over answers of token means (2402.03300)
      one_shot         grpo with an entropy bonus of 0.001 (2504.20571)
      bnpo             grpo, mean over tokens (TRL)
      dr_grpo          grpo over a constant length, A without std (2503.20783)
      dapo             bnpo with more room upwards (2503.14476)
      gspo             r of whole answers, clipped tightly (2507.18071)
      gspo_token       gspo that takes an A per token (2507.18071)
      luspo            gspo, summed over the tokens of an answer (2602.05261)
      gmpo             geometric mean of an answer's bounded r (2507.20673)
      cispo            capped r is a weight: no token is cut off (2506.13585)
      sapo             sigmoid of r, a clip that closes softly (2511.20347)
      vespo            reshaped r of whole answers is a weight (2602.10693)
      dppo             cispo, off where a probability moved by 0.15 (2602.04879)
      reinforce        -A·logprob, summed over the tokens of an answer
      gpg              -A·logprob, mean over tokens (2504.02546)
      two_sided        grpo, r at most 4 where A < 0 too (2505.07291)
      icepop           bnpo where sampler and trainer agree (Ling team, 2025)
      clip_covariance  bnpo less some tokens that sink the entropy (2505.22617)
      kl_covariance    -r·A with a penalty on such tokens (2505.22617)
    """

    loss: Literal[tuple(LOSSES)] = "grpo"  # type: ignore[valid-type]
    """One of the above."""
    beta: float = 0.0
    """Weight of the KL to the reference, a frozen model that is kept where this is above 0."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "k3_corrected", "abs"] = "k3"
    """Which estimate of that KL; choosing one is choosing a gradient, see the README."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus. None: 0, of one_shot 0.001."""
    surrogate: (
        Literal["clip", "ratio", "gmpo", "cispo", "sapo", "dppo", "reinforce", "vespo"] | None
    ) = None
    """The term of each token. clip: of r; ratio: r as it is; reinforce: no r; others: see above."""
    ratio_level: Literal["token", "sequence", "sequence_token"] | None = None
    """r of each token, of the whole answer (geometric mean), or its value with a token's
    gradient."""
    epsilon_low: float | None = None
    """Lower clip, 1 - this, of r; gmpo: of ln r; dppo: of the change of the probability."""
    epsilon_high: float | None = None
    """Upper clip, 1 + this, of r; gmpo: of ln r; dppo: of the change of the probability."""
    delta: float | None = None
    """clip: r is at most this where A < 0; above 1 + --epsilon-high."""
    dual_clip: float | None = None
    """clip: the loss is at most this times |A| where A < 0 (1912.09729)."""
    ratio_cap: float | None = None
    """cispo, dppo: r is at most this."""
    tau_positive: float | None = None
    """sapo: steepness of the sigmoid where A > 0."""
    tau_negative: float | None = None
    """sapo: steepness of the sigmoid elsewhere."""
    k_positive: float | None = None
    """vespo: k in the weight e^λ r^k e^(-λr) where A >= 0."""
    lambda_positive: float | None = None
    """vespo: λ in that weight where A >= 0."""
    k_negative: float | None = None
    """vespo: k in that weight where A < 0."""
    lambda_negative: float | None = None
    """vespo: λ in that weight where A < 0."""
    aggregation: (
        Literal["sequence_mean", "token_mean", "fixed_length", "sequence_sum_mean"] | None
    ) = None
    """Mean of the answers' means, mean over tokens, sum / (answers · a constant length), or mean of
    the answers' sums."""
    max_completion_length: int | None = None
    """fixed_length: that constant. None: --max-new-tokens."""
    importance_mode: Literal["truncate", "mask"] | None = None
    """What is done to w = exp(trainer - sampler), the weight for a sampler of other numbers:
    brought between floor and cap, or 0 outside."""
    importance_level: Literal["token", "sequence"] | None = None
    """w of each token, or of the whole answer (product)."""
    importance_floor: float | None = None
    """Least w. None: the loss's own, or no bound."""
    importance_cap: float | None = None
    """Largest w: 2 but for icepop; no w is above 5e8."""
    off_policy_threshold: float | None = None
    """Answers of A < 0 teach nothing where the mean of the sampler's log-probs less the
    trainer's is above this."""
    top_entropy: float | None = None
    """Only this fraction of the tokens teaches, those of the highest entropy (2506.01939); of each
    micro-batch by itself."""
    clip_cov: float | None = None
    """This fraction of the tokens teaches nothing, drawn where log-prob and A rise together; of
    each micro-batch by itself."""
    clip_cov_low: float | None = None
    """They are drawn where (A - mean)·(logprob - mean) is above this."""
    clip_cov_high: float | None = None
    """They are drawn where it is below this."""
    kl_cov: float | None = None
    """This fraction of the tokens, where (A - mean)·(logprob - mean) is largest, pays |ln r|; of
    each micro-batch by itself, from the second optimiser step on."""
    kl_cov_coef: float | None = None
    """Weight of |ln r| there."""

    def loss_fields(self) -> dict[str, Any]:
        """The keyword arguments of LossConfig: the named loss's, and over them the flags."""
        flags = {name: getattr(self, name) for name in SETTINGS_OF_LOSSES}
        given = {name: value for name, value in flags.items() if value is not None}
        return {**LOSSES[self.loss], **given}


SETTINGS_OF_LOSSES = tuple(each.name for each in fields(LossSettings) if each.name != "loss")


def in_flags(message: str) -> str:
    """What LossConfig says of its settings, in the words of the command line."""

    def flag(found: re.Match) -> str:
        return "--" + found[1].replace("_", "-") + " " * bool(found[2])

    return re.sub(rf"\b({'|'.join(SETTINGS_OF_LOSSES)})\b(=?)", flag, message)
