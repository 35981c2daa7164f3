"""Policy losses with the signature that verl calls, and their registration.

The contract is that of verl 0.9.1: its `trainer/ppo/core_algos.py`. verl is imported by `register`
only. Its workers import their `external_lib`, so two settings choose an objective of this package:

    actor_rollout_ref.model.external_lib=grpo_kernels.integrations.verl_plugin
    actor_rollout_ref.actor.policy_loss.loss_mode=grpo_kernels/gspo
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..objective.metrics import MaskedReductions
from ..objective.policy_loss import LossConfig
from ..objective.ratios import MAX_LOG_RATIO, PolicyRatios
from ..objective.sequences import Sequences
from ..objective.surrogates import Dppo
from ..validation import expect_choice
from .verl_advantages import ESTIMATORS
from .weighted_loss import weighted_policy_loss


def _clip(side: str) -> Callable[[Any], float]:
    """Read clip_ratio_low or clip_ratio_high of verl's actor config; None means clip_ratio."""

    def read(actor: Any) -> float:
        bound = getattr(actor, f"clip_ratio_{side}")
        return actor.clip_ratio if bound is None else bound

    return read


# A key is a named constructor of LossConfig; it sets these fields from verl's actor config. A
# setting that is None there leaves the field as the constructor has it.
Fields = dict[str, Callable[[Any], float | None]]
_CLIP: Fields = {"epsilon_low": _clip("low"), "epsilon_high": _clip("high")}
_DPPO = _CLIP | {"ratio_cap": attrgetter("clip_ratio_c")}
OBJECTIVES: dict[str, Fields] = {
    "grpo": _CLIP | {"dual_clip": attrgetter("clip_ratio_c")},
    "gspo": _CLIP,
    "gspo_token": _CLIP,
    "gmpo": _CLIP,
    "cispo": {
        "ratio_floor": lambda actor: max(0.0, 1 - _clip("low")(actor)),
        "ratio_cap": lambda actor: 1 + _clip("high")(actor),
    },
    "sapo": {"tau_positive": attrgetter("tau_pos"), "tau_negative": attrgetter("tau_neg")},
    "vespo": {},
    "dppo": _DPPO,
    "dppo_kl": _DPPO,
    "dro": {"proximal_coef": attrgetter("policy_loss.dro_beta")},
    "reinforce": {},
    "clip_covariance": {
        **_CLIP,
        "clip_cov": attrgetter("policy_loss.clip_cov_ratio"),
        "clip_cov_low": attrgetter("policy_loss.clip_cov_lb"),
        "clip_cov_high": attrgetter("policy_loss.clip_cov_ub"),
    },
    "kl_covariance": {
        "kl_cov": attrgetter("policy_loss.kl_cov_ratio"),
        "kl_cov_coef": attrgetter("policy_loss.ppo_kl_coef"),
    },
}

# Objectives for which verl averages over sequences, whatever loss_agg_mode is.
SEQUENCE_MEANS = frozenset({"sapo", "gmpo"})

# Fields of a LossConfig that must have their default, because verl does what they would do.
_VERL_DOES = (
    dict.fromkeys(
        ("beta", "entropy_coef", "top_entropy"),
        "passes no reference log-probs and no entropies, and adds both terms itself",
    )
    | dict.fromkeys(
        ("importance_mode", "importance_level", "importance_floor", "importance_cap"),
        "weights the tokens of a sampler itself, by rollout_is_weights",
    )
    | {
        "rejection": "rejects tokens itself, by rollout_rs",
        "nll_coef": "passes no weights of a cross-entropy term",
    }
)

_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum_mean",
    "seq-mean-token-sum-norm": "fixed_length",
}


def make_policy_loss(config: LossConfig | str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Make a policy loss for verl's registry.

    The aggregation and the denominator follow verl: `loss_agg_mode` with `global_batch_info` and
    `loss_scale_factor` of the actor's config. As in verl, "sapo" and "gmpo" ("geo_mean" there) are
    averaged over each sequence and then over sequences instead, and warn if `loss_agg_mode` is
    another. "gmpo" divides by the sequences of the global batch, where verl's divides by those of
    the micro-batch. verl adds the entropy bonus and the KL itself.

    Args:
        config: a key of OBJECTIVES, which lists the settings that are then read from verl's actor
            config; or a LossConfig, used as it is except for its aggregation.

    Returns:
        A function with verl's keywords: old_log_prob, log_prob, advantages, response_mask [B, T],
        loss_agg_mode, config, rollout_is_weights [B, T] >= 0 or None. The weights multiply the
        terms of the tokens; for "gmpo" it is their geometric mean over the sequence. It returns
        the 0-dim loss and metrics, floats: actor/pg_clipfrac, actor/pg_clipfrac_lower and
        actor/ppo_kl as verl computes them for this objective, or 0 where it has none, with
        log-ratios of at most 20; and the metrics of `policy_loss` prefixed by "actor/".

    Raises:
        ValueError: an unknown name or mode, or a LossConfig that needs inputs verl does not pass.
    """
    if isinstance(config, str):
        expect_choice("config", config, sorted(OBJECTIVES))
        read = functools.partial(read_objective, config)
        return functools.partial(_policy_loss, read, config in SEQUENCE_MEANS)
    default = LossConfig()
    for name, reason in _VERL_DOES.items():
        value, expected = getattr(config, name), getattr(default, name)
        if value != expected:
            raise ValueError(f"{name} must be {expected}, got {value}: verl {reason}")
    if config.policy_term.relative_to_sampler:
        raise ValueError(
            f"surrogate={config.surrogate!r} needs the sampler's log-probs, which verl does not "
            "pass to a policy loss"
        )
    return functools.partial(_policy_loss, lambda actor: config, False)


def read_objective(name: str, actor: Any) -> LossConfig:
    """Return the LossConfig of a key of OBJECTIVES with the settings of verl's actor config."""
    fields = {field: read(actor) for field, read in OBJECTIVES[name].items()}
    given = {field: value for field, value in fields.items() if value is not None}
    return LossConfig.objectives()[name](**given)


def register(prefix: str = "grpo_kernels/", **configs: LossConfig) -> list[str]:
    """Register every objective, and each config under its name, as a `loss_mode` of verl.

    The estimators of `verl_advantages` are registered as `algorithm.adv_estimator`.

    Returns:
        The names of the losses: prefix + a key of OBJECTIVES or of `configs`.
    """
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    for name, estimator in ESTIMATORS.items():
        register_adv_est(prefix + name)(estimator)
    losses = {name: name for name in OBJECTIVES} | configs
    for name, config in losses.items():
        register_policy_loss(prefix + name)(make_policy_loss(config))
    return [prefix + name for name in losses]


def _policy_loss(
    objective: Callable[[Any], LossConfig],
    is_sequence_mean: bool,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute a policy loss with verl's signature; `objective` reads verl's actor config."""
    mask, loss_config = response_mask.bool(), objective(config)
    expect_choice("loss_agg_mode", loss_agg_mode, _AGGREGATIONS)
    if is_sequence_mean and loss_agg_mode != "seq-mean-token-mean":
        warnings.warn(
            f"loss_agg_mode={loss_agg_mode!r} is not read with surrogate={loss_config.surrogate!r}:"
            " the loss is averaged over each sequence and then over sequences, as in verl",
            stacklevel=2,
        )
        loss_agg_mode = "seq-mean-token-mean"
    aggregation, normalizer = _aggregation(loss_agg_mode, mask, **config.global_batch_info)
    loss_config = dataclasses.replace(loss_config, **aggregation)
    if rollout_is_weights is not None and loss_config.surrogate == "gmpo":
        log_weights = (rollout_is_weights + 1e-10).log()
        rollout_is_weights = Sequences(mask, None).mean(log_weights).exp()
    (loss, metrics), ratios = weighted_policy_loss(
        log_prob,
        advantages,
        rollout_is_weights,
        mask=mask,
        old_logprob=old_log_prob,
        config=loss_config,
        normalizer=normalizer,
    )
    del metrics["policy_loss"], metrics["num_tokens"]  # verl has its own
    metrics |= _verl_metrics(ratios, metrics, loss_config)
    values = torch.stack(list(metrics.values())).tolist()  # one device sync for all
    return loss, {f"actor/{name}": value for name, value in zip(metrics, values, strict=True)}


def _verl_metrics(
    ratios: PolicyRatios, metrics: dict[str, Tensor], config: LossConfig
) -> dict[str, Tensor]:
    """Compute the metrics that verl plots, under its names; verl's own losses differ in them."""
    mean, advantage = MaskedReductions(ratios.sequences).mean, ratios.advantage
    log_ratio = ratios.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    low, high = config.policy_term.clipped(ratios)
    clipped, lower = low | high, torch.zeros_like(low)
    if config.dual_clip is not None:
        lower = (advantage < 0) & (ratios.ratio > config.dual_clip)
    if isinstance(config.policy_term, Dppo):
        kept = config.policy_term.weight(ratios) > 0
        clipped, lower = ~kept, kept & (ratios.ratio > config.policy_term.ratio_cap)
    elif config.surrogate == "cispo":
        assert config.ratio_cap is not None
        clipped = (ratios.ratio < config.ratio_floor) | (ratios.ratio > config.ratio_cap)
    elif config.surrogate == "gmpo":
        outside = (log_ratio < -config.epsilon_low) | (log_ratio > config.epsilon_high)
        clipped, lower = outside & (advantage > 0), outside & (advantage < 0)
    dtype = log_ratio.dtype
    fraction = mean(clipped.to(dtype))
    if config.clip_cov is not None:
        fraction = 1 - metrics["filters/kept_mean"]
    return {
        "pg_clipfrac": fraction,
        "pg_clipfrac_lower": mean(lower.to(dtype)),
        "ppo_kl": mean(-log_ratio if config.kl_cov is None else log_ratio.abs()),
    }


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[dict[str, Any], float | Tensor]:
    """Return (fields of LossConfig, normalizer); verl does not count fully masked sequences."""
    fields: dict[str, Any] = {
        "aggregation": _AGGREGATIONS[mode],
        "max_completion_length": None,
        "completions_per_prompt": None,
    }
    if mode == "token-sum":
        return fields, 1 / dp_size
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    if count is None and dp_size > 1:
        raise ValueError(
            f"global_batch_info must have the counts of the whole batch with dp_size={dp_size}, "
            f"got none for {mode}"
        )
    if count is None:
        count = mask.sum() if mode == "token-mean" else mask.any(-1).sum()
    if mode == "seq-mean-token-sum-norm":
        length = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
        fields["max_completion_length"] = length
        count = count * length
    return fields, count / dp_size
