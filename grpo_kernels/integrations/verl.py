"""Adapters with the signatures that verl calls: fused log-probs, and policy losses.

The contract is that of verl 0.10.0.dev, August 2026: its `utils/kernel/linear_cross_entropy.py` and
`trainer/ppo/core_algos.py`. Only `register` and `install_kernel` import verl. Its workers import
their `external_lib`, so two settings choose an objective of this package:

    actor_rollout_ref.model.external_lib=grpo_kernels.integrations.verl_plugin
    actor_rollout_ref.actor.policy_loss.loss_mode=grpo_kernels/gspo
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..objective.policy_loss import LossConfig, policy_loss
from ..ops.linear_token_stats import linear_token_stats
from ..validation import expect_choice

# A key is a named constructor of LossConfig; it sets these fields from verl's actor config.
_CLIP = {"epsilon_low": "clip_ratio_low", "epsilon_high": "clip_ratio_high"}
OBJECTIVES: dict[str, dict[str, str]] = {
    "grpo": _CLIP | {"dual_clip": "clip_ratio_c"},
    "gspo": _CLIP,
    "gspo_token": _CLIP,
    "gmpo": _CLIP,
    "cispo": {},
    "sapo": {"tau_positive": "tau_pos", "tau_negative": "tau_neg"},
    "vespo": {},
    "dppo": _CLIP | {"ratio_cap": "clip_ratio_c"},
    "reinforce": {},
    "clip_covariance": {
        **_CLIP,
        "clip_cov": "policy_loss.clip_cov_ratio",
        "clip_cov_low": "policy_loss.clip_cov_lb",
        "clip_cov_high": "policy_loss.clip_cov_ub",
    },
    "kl_covariance": {
        "kl_cov": "policy_loss.kl_cov_ratio",
        "kl_cov_coef": "policy_loss.ppo_kl_coef",
    },
}

# Fields of a LossConfig that must have their default, because verl does what they would do.
_VERL_DOES = dict.fromkeys(
    ("beta", "entropy_coef", "top_entropy"),
    "passes no reference log-probs and no entropies, and adds both terms itself",
) | dict.fromkeys(
    ("importance_mode", "importance_level", "importance_floor", "importance_cap"),
    "weights the tokens of a sampler itself, by rollout_is_weights",
)

_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum_mean",
    "seq-mean-token-sum-norm": "fixed_length",
}

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logprob: logprob,
    "sum": Tensor.sum,
    "mean": Tensor.mean,
}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
    *,
    impl_backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of labels and entropies, like verl's function of this name.

    Args:
        hidden: [..., H].
        weight: [V, H]; with `dist_process_group` the shard [V / ranks, H] of this rank. verl passes
            `lm_head.weight`, also to its own kernel: with a LoRA on the head, this is the frozen
            weight without the adapter, so leave `lm_head` out of `target_modules`.
        labels: [...], the N tokens that `hidden` predicts, in the same order.
        temperature: > 0; a number, or a tensor of one or N.
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: the tensor-parallel group that shards the vocabulary.
        impl_backend: ignored; verl chooses among its own kernels with it.

    Returns:
        (log-probs [N], or 0-dim if reduced; entropies [N], never reduced), in nats, fp32 (fp64 for
        fp64), differentiable in `hidden` and `weight`. With `dist_process_group` each rank gets its
        share of the gradient of `hidden`: the sum over ranks is the gradient. verl leaves the sum
        to Megatron's `sequence_parallel`; without that nothing adds them up.

    Raises:
        ValueError, TypeError: as `linear_token_stats`, and for an unknown reduction.
    """
    expect_choice("reduction", reduction, _REDUCTIONS)
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten()
    if dist_process_group is not None:
        hidden = _GradientShare.apply(hidden, dist_process_group.size())
    stats = linear_token_stats(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        temperature=temperature,
        vocab_group=dist_process_group,
    )
    assert stats.entropy is not None
    return _REDUCTIONS[reduction](stats.logprob), stats.entropy


class _GradientShare(torch.autograd.Function):
    """Identity whose gradient is divided by the number of ranks: Megatron sums over all ranks."""

    @staticmethod
    def forward(ctx, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> tuple[Tensor, None]:
        return d_hidden / ctx.ranks, None


def make_policy_loss(config: LossConfig | str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Make a policy loss for verl's registry.

    The aggregation and the denominator follow verl: `loss_agg_mode`, whatever the objective, with
    `global_batch_info` and `loss_scale_factor` of the actor's config. verl adds the entropy bonus
    and the KL itself.

    Args:
        config: a key of OBJECTIVES, which lists the settings that are then read from verl's actor
            config; or a LossConfig, used as it is except for its aggregation.

    Returns:
        A function with verl's keywords: old_log_prob, log_prob, advantages, response_mask [B, T],
        loss_agg_mode, config, rollout_is_weights [B, T] >= 0 or None. It returns the 0-dim loss
        and metrics, floats: actor/pg_clipfrac (of sequences for a sequence-level ratio),
        actor/pg_clipfrac_lower (where the dual clip is active) and actor/ppo_kl as in verl, and
        the metrics of `policy_loss` prefixed by "actor/".

    Raises:
        ValueError: an unknown name or mode, or a LossConfig that needs inputs verl does not pass.
    """
    if isinstance(config, str):
        expect_choice("config", config, sorted(OBJECTIVES))
        return functools.partial(_policy_loss, functools.partial(read_objective, config))
    default = LossConfig()
    for name, reason in _VERL_DOES.items():
        value, expected = getattr(config, name), getattr(default, name)
        if value != expected:
            raise ValueError(f"{name} must be {expected}, got {value}: verl {reason}")
    return functools.partial(_policy_loss, lambda actor: config)


def read_objective(name: str, actor: Any) -> LossConfig:
    """Return the LossConfig of a key of OBJECTIVES with the settings of verl's actor config."""
    fields = {field: attrgetter(setting)(actor) for field, setting in OBJECTIVES[name].items()}
    for field in _CLIP:
        if field in fields and fields[field] is None:
            fields[field] = actor.clip_ratio
    return LossConfig.objectives()[name](**fields)


def register(prefix: str = "grpo_kernels/", **configs: LossConfig) -> list[str]:
    """Register every objective, and each config under its name, as a `loss_mode` of verl.

    Returns:
        The names: prefix + a key of OBJECTIVES or of `configs`.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    losses = {name: name for name in OBJECTIVES} | configs
    for name, config in losses.items():
        register_policy_loss(prefix + name)(make_policy_loss(config))
    return [prefix + name for name in losses]


def install_kernel() -> None:
    """Replace verl's `linear_cross_entropy`, which `use_fused_kernels=True` calls.

    transformers models look it up at each call, Megatron models when verl's module is imported.
    """
    from verl.utils.kernel import linear_cross_entropy as module

    module.linear_cross_entropy = linear_cross_entropy


def _policy_loss(
    objective: Callable[[Any], LossConfig],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute a policy loss with verl's signature; `objective` reads verl's actor config."""
    mask = response_mask.bool()
    aggregation, normalizer = _aggregation(loss_agg_mode, mask, **config.global_batch_info)
    loss_config = dataclasses.replace(objective(config), **aggregation)
    weighted = advantages
    if rollout_is_weights is not None:
        if loss_config.clip_cov is not None or loss_config.kl_cov is not None:
            raise ValueError(
                "rollout_is_weights must be None with clip_cov and kl_cov, got a tensor: it would "
                "change which tokens are chosen"
            )
        # A policy term is proportional to its advantage, and clips depend on its sign: keep that.
        weighted = advantages * rollout_is_weights.clamp(min=1e-30)
    loss, metrics = policy_loss(
        log_prob,
        weighted,
        mask=mask,
        old_logprob=old_log_prob,
        config=loss_config,
        normalizer=normalizer,
    )
    del metrics["policy_loss"], metrics["num_tokens"]  # verl has its own

    # Add the metrics that verl plots, under its names.
    log_ratio, count = log_prob.detach() - old_log_prob, mask.sum().clamp(min=1)
    is_capped = torch.zeros_like(mask)
    if loss_config.dual_clip is not None:
        is_capped = mask & (advantages < 0) & (log_ratio > math.log(loss_config.dual_clip))
    metrics |= {
        "pg_clipfrac": metrics["clip_ratio/region_mean"],
        "pg_clipfrac_lower": is_capped.sum() / count,
        "ppo_kl": -log_ratio.clamp(-20, 20).masked_fill(~mask, 0).sum() / count,
    }
    values = torch.stack(list(metrics.values())).tolist()  # one device sync for all
    return loss, {f"actor/{name}": value for name, value in zip(metrics, values, strict=True)}


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[dict[str, Any], float | Tensor]:
    """Return (fields of LossConfig, normalizer); verl does not count fully masked sequences."""
    expect_choice("loss_agg_mode", mode, _AGGREGATIONS)
    fields = {"aggregation": _AGGREGATIONS[mode], "max_completion_length": None}
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
