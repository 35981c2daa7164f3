"""Checks of a LossConfig's numbers, and that its settings make sense together."""

from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..validation import expect_number

if TYPE_CHECKING:
    from ..objective.config import LossConfig

_ANY, _NOT_NEGATIVE, _POSITIVE, _FRACTION = (
    MappingProxyType(bounds)
    for bounds in ({}, {"at_least": 0}, {"above": 0}, {"above": 0, "at_most": 1})
)
_NUMBERS = {
    "epsilon_low": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "delta": _POSITIVE,
    "dual_clip": MappingProxyType({"above": 1}),
    "ratio_cap": _POSITIVE,
    "tau_positive": _POSITIVE,
    "tau_negative": _POSITIVE,
    "k_positive": _NOT_NEGATIVE,
    "lambda_positive": _NOT_NEGATIVE,
    "k_negative": _NOT_NEGATIVE,
    "lambda_negative": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "entropy_coef": _ANY,
    "importance_floor": _NOT_NEGATIVE,
    "importance_cap": _POSITIVE,
    "off_policy_threshold": _ANY,
    "top_entropy": _FRACTION,
    "clip_cov": _FRACTION,
    "clip_cov_low": _ANY,
    "clip_cov_high": _ANY,
    "kl_cov": _FRACTION,
    "kl_cov_coef": _NOT_NEGATIVE,
}


def check_numbers(config: "LossConfig") -> None:
    optional = {each.name for each in fields(config) if each.default is None} | {"importance_cap"}
    for name, bounds in _NUMBERS.items():
        value = getattr(config, name)
        if value is not None or name not in optional:
            expect_number(name, value, **bounds)


# A setting that is not at its default -> what reads it: surrogates, or another setting.
_OF_SURROGATES = {
    "epsilon_low": ("clip", "gmpo", "dppo"),
    "epsilon_high": ("clip", "gmpo", "dppo"),
    "delta": ("clip",),
    "dual_clip": ("clip",),
    "ratio_cap": ("cispo", "dppo"),
    "tau_positive": ("sapo",),
    "tau_negative": ("sapo",),
    **dict.fromkeys(("k_positive", "lambda_positive", "k_negative", "lambda_negative"), ("vespo",)),
}
_OF_SETTINGS = {"clip_cov_low": "clip_cov", "clip_cov_high": "clip_cov", "kl_cov_coef": "kl_cov"}
_TOKEN_LEVEL = {
    "vespo": "weighs whole sequences itself",
    "gmpo": "averages over the sequence itself",
    "reinforce": "has no ratio",
    "dppo": "bounds each token's own probability",
}


def check_combination(config: "LossConfig") -> None:
    """That the settings of a LossConfig make sense together."""
    surrogate = config.surrogate
    _check_readers(config)
    if config.ratio_cap is None and surrogate in _OF_SURROGATES["ratio_cap"]:
        raise ValueError(f"surrogate={surrogate!r} needs ratio_cap, got None")
    if config.delta is not None:
        expect_number("delta", config.delta, above=1 + config.epsilon_high)
    if config.ratio_level != "token" and surrogate in _TOKEN_LEVEL:
        raise ValueError(
            f"surrogate={surrogate!r} {_TOKEN_LEVEL[surrogate]}: ratio_level must be 'token', "
            f"got {config.ratio_level!r}"
        )
    if surrogate == "vespo" and config.importance_level != "token":
        raise ValueError(
            "surrogate='vespo' sums the sampler's log-ratios itself: importance_level must be "
            f"'token', got {config.importance_level!r}"
        )
    _check_importance(config)
    if config.clip_cov is not None and config.kl_cov is not None:
        raise ValueError("clip_cov and kl_cov are two cures of one thing: set only one")
    if config.clip_cov_low >= config.clip_cov_high:
        raise ValueError(
            f"clip_cov_low must be less than clip_cov_high={config.clip_cov_high}, "
            f"got {config.clip_cov_low}"
        )


def _check_readers(config: "LossConfig") -> None:
    """That no setting is given which nothing reads."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if value == field.default:
            continue
        readers = _OF_SURROGATES.get(name, (config.surrogate,))
        if config.surrogate not in readers:
            raise ValueError(
                f"{name} is read by surrogate={' or '.join(map(repr, readers))} only, "
                f"got {value!r} with surrogate={config.surrogate!r}"
            )
        needed = _OF_SETTINGS.get(name)
        if needed is not None and getattr(config, needed) is None:
            raise ValueError(f"{name} is read with {needed} only, got {value!r} without")


def _check_importance(config: "LossConfig") -> None:
    floor, cap = config.importance_floor, config.importance_cap
    if floor is not None and cap is not None and floor >= cap:
        raise ValueError(f"importance_floor must be less than importance_cap={cap}, got {floor}")
    if config.importance_mode == "mask" and floor is None and cap is None:
        raise ValueError("importance_mode='mask' needs importance_floor or importance_cap")
