"""The objective's settings: each published objective is a point in their space."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The settings of `policy_loss`, unchecked; the module that reads a field says what it does."""

    # surrogates.py
    surrogate: str = "clip"
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    # objective.py
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    max_completion_length: int | None = None

    # ratios.py
    importance_mode: str = "truncate"
    importance_level: str = "token"
    importance_floor: float | None = None
    importance_cap: float | None = 2.0

    # token_filters.py
    off_policy_threshold: float | None = None
    top_entropy: float | None = None
    clip_cov: float | None = None
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov: float | None = None
    kl_cov_coef: float = 1.0
