"""verl's log-probs and policy losses, by ours: adapters with the signatures that verl calls.

The contract is that of verl 0.10.0.dev, August 2026: its `utils/kernel/linear_cross_entropy.py` and
`trainer/ppo/core_algos.py`. verl is imported by `register` and `install_kernel` only. Its workers
import what is their `external_lib`, so that two settings choose one of our objectives:

    actor_rollout_ref.model.external_lib=grpo_kernels.integrations.verl_plugin
    actor_rollout_ref.actor.policy_loss.loss_mode=grpo_kernels/gspo
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objective.policy_loss import LossConfig
from ..objective.policy_loss import policy_loss as loss_of_tokens
from ..ops.linear_token_stats import linear_token_stats

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]


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
    """The log-probs of labels and the entropies, as verl's function of this name returns them.

    Args:
        hidden: [..., H]; weight: [V, H], or with `dist_process_group` this rank's [V / ranks, H].
        labels: [...], the N tokens that `hidden` predicts, in the same order.
        temperature: > 0; a number, or a tensor of one or N.
        reduction: of the log-probs: "none", "sum" or "mean".
        impl_backend: verl's choice among its own kernels, not read.

    Returns:
        (log-probs [N], or 0-dim if reduced; entropies [N], never reduced), in nats, fp32 (fp64 of
        fp64), differentiable in `hidden` and `weight`. With `dist_process_group` the gradients of
        `hidden` add up over its ranks to the whole, which verl leaves to Megatron and its
        `sequence_parallel`: without that nobody adds them up.

    Raises:
        ValueError, TypeError: as `linear_token_stats`, and for an unknown reduction.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(_REDUCTIONS)}, got {reduction!r}")
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten()
    ranks = {}
    if dist_process_group is not None:
        ranks = {"vocab_group": dist_process_group}
        hidden = _Share.apply(hidden, dist_process_group.size())
    stats = linear_token_stats(
        hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature, **ranks
    )
    return _REDUCTIONS[reduction](stats.logprob), stats.entropy


class _Share(torch.autograd.Function):
    """Hidden states whose gradient is this rank's share: Megatron adds up those of all ranks."""

    @staticmethod
    def forward(ctx, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def policy_loss(config: LossConfig | str) -> PolicyLoss:
    """A policy loss for verl's registry.

    What is aggregated and divided by follows verl: `loss_agg_mode`, whatever the objective, with
    the `global_batch_info` and `loss_scale_factor` of the actor's config; so do the entropy bonus
    and the KL, which verl adds itself.

    Args:
        config: the name of an objective, a key of OBJECTIVES, whose settings are then verl's own,
            clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, tau_neg, clip_cov_ratio,
            clip_cov_lb, clip_cov_ub, kl_cov_ratio, ppo_kl_coef, where the objective has such a
            thing; or a LossConfig, which is taken as it is but for its aggregation.

    Returns:
        A function of verl's keywords: old_log_prob, log_prob, advantages, response_mask [B, T],
        loss_agg_mode, config, rollout_is_weights [B, T] >= 0 or None. It returns the 0-dim loss
        and metrics, floats: actor/pg_clipfrac (of sequences where the ratio is of sequences),
        actor/pg_clipfrac_lower (where the dual clip acts) and actor/ppo_kl as in verl, and ours of
        `policy_loss` behind "actor/".

    Raises:
        ValueError: an unknown name or mode, or a LossConfig that reads what verl does not pass on.
    """
    if isinstance(config, str):
        if config not in OBJECTIVES:
            raise ValueError(f"config must be one of {sorted(OBJECTIVES)}, got {config!r}")
        return functools.partial(_policy_loss, OBJECTIVES[config])
    for name, (off, reason) in _UNREAD.items():
        if getattr(config, name) != off:
            raise ValueError(f"{name} must be {off}, got {getattr(config, name)}: verl {reason}")
    return functools.partial(_policy_loss, lambda actor: config)


_TERMS = "passes no reference and no entropies, and adds both terms itself"
_WEIGHTS = "weighs a sampler's tokens itself, by rollout_is_weights"
# The fields of a LossConfig that must be as they are by default.
_UNREAD = {
    "beta": (0, _TERMS),
    "entropy_coef": (0, _TERMS),
    "top_entropy": (None, _TERMS),
    "importance_mode": ("truncate", _WEIGHTS),
    "importance_level": ("token", _WEIGHTS),
    "importance_floor": (None, _WEIGHTS),
    "importance_cap": (2.0, _WEIGHTS),
}


def register(prefix: str = "grpo_kernels/", **configs: LossConfig) -> list[str]:
    """Make every objective, and each config by its name, a `loss_mode` of verl.

    Returns:
        The names: prefix + a key of OBJECTIVES or of `configs`.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    losses = {prefix + name: each for name, each in (dict.fromkeys(OBJECTIVES) | configs).items()}
    for name, config in losses.items():
        register_policy_loss(name)(policy_loss(config or name.removeprefix(prefix)))
    return list(losses)


def install_kernel() -> None:
    """Put our `linear_cross_entropy` in the place of verl's, read with `use_fused_kernels=True`.

    Models of transformers look for it at each call, Megatron's when verl's module is imported.
    """
    from verl.utils.kernel import linear_cross_entropy as module

    module.linear_cross_entropy = linear_cross_entropy


def _clip(actor: Any) -> dict[str, float]:
    bounds = {"epsilon_low": actor.clip_ratio_low, "epsilon_high": actor.clip_ratio_high}
    return {k: actor.clip_ratio if v is None else v for k, v in bounds.items()}


def _dual_clip(actor: Any) -> dict[str, float]:
    return {**_clip(actor), "dual_clip": actor.clip_ratio_c}


def _clip_covariance(actor: Any) -> dict[str, float]:
    own = actor.policy_loss
    bounds = {"clip_cov_low": own.clip_cov_lb, "clip_cov_high": own.clip_cov_ub}
    return {**_clip(actor), "clip_cov": own.clip_cov_ratio, **bounds}


def _kl_covariance(actor: Any) -> dict[str, float]:
    own = actor.policy_loss
    return {"kl_cov": own.kl_cov_ratio, "kl_cov_coef": own.ppo_kl_coef}


# Name -> the objective with the settings of verl's actor config.
OBJECTIVES: dict[str, Callable[[Any], LossConfig]] = {
    "grpo": lambda actor: LossConfig.grpo(**_dual_clip(actor)),
    "gspo": lambda actor: LossConfig.gspo(**_clip(actor)),
    "gspo_token": lambda actor: LossConfig.gspo_token(**_clip(actor)),
    "gmpo": lambda actor: LossConfig.gmpo(**_clip(actor)),
    "cispo": lambda actor: LossConfig.cispo(),
    "sapo": lambda actor: LossConfig.sapo(tau_positive=actor.tau_pos, tau_negative=actor.tau_neg),
    "vespo": lambda actor: LossConfig.vespo(),
    "dppo": lambda actor: LossConfig.dppo(**_clip(actor), ratio_cap=actor.clip_ratio_c),
    "reinforce": lambda actor: LossConfig.reinforce(),
    "clip_covariance": lambda actor: LossConfig.clip_covariance(**_clip_covariance(actor)),
    "kl_covariance": lambda actor: LossConfig.kl_covariance(**_kl_covariance(actor)),
}

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logprob: logprob,
    "sum": Tensor.sum,
    "mean": Tensor.mean,
}


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
    mask = response_mask.bool()
    aggregation, normalizer = _aggregation(loss_agg_mode, mask, **config.global_batch_info)
    chosen = dataclasses.replace(objective(config), **aggregation)
    by_covariance = chosen.clip_cov is not None or chosen.kl_cov is not None
    if rollout_is_weights is not None and by_covariance:
        raise ValueError(
            "rollout_is_weights must be None with clip_cov and kl_cov, got a tensor: it would "
            "change which tokens are chosen"
        )
    weighted = advantages
    if rollout_is_weights is not None:
        # A term is as large as its advantage, of which only the sign decides on clips: that stays.
        weighted = advantages * rollout_is_weights.clamp(min=1e-30)
    loss, metrics = loss_of_tokens(
        log_prob,
        weighted,
        mask=mask,
        old_logprob=old_log_prob,
        config=chosen,
        normalizer=normalizer,
    )
    del metrics["policy_loss"], metrics["num_tokens"]  # verl has its own
    metrics |= _verl_metrics(log_prob.detach() - old_log_prob, advantages, mask, chosen, metrics)
    values = torch.stack(list(metrics.values())).tolist()  # one wait for the device, not one each
    return loss, {f"actor/{name}": value for name, value in zip(metrics, values, strict=True)}


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[dict[str, Any], float | Tensor]:
    """(fields of LossConfig, normalizer): in verl a sequence that is all masked does not count."""
    settings: dict[str, Any] = {
        "aggregation": _AGGREGATIONS.get(mode),
        "max_completion_length": None,  # of the config's own aggregation
    }
    if mode == "token-sum":
        return settings, 1 / dp_size
    given = batch_num_tokens if mode == "token-mean" else global_batch_size
    if given is None and dp_size > 1:
        raise ValueError(
            f"global_batch_info must have the counts of the whole batch with dp_size={dp_size}, "
            f"got none for {mode}"
        )
    match mode:
        case "token-mean":
            count = mask.sum() if given is None else given
        case "seq-mean-token-mean" | "seq-mean-token-sum":
            count = mask.any(-1).sum() if given is None else given
        case "seq-mean-token-sum-norm":
            length = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
            settings["max_completion_length"] = length
            count = (mask.any(-1).sum() if given is None else given) * length
        case _:
            modes = list(_AGGREGATIONS)
            raise ValueError(f"loss_agg_mode must be one of {modes}, got {mode!r}")
    return settings, count / dp_size


_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum_mean",
    "seq-mean-token-sum-norm": "fixed_length",
}


def _verl_metrics(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig,
    metrics: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What verl plots, under its names."""
    count = mask.sum().clamp(min=1)
    capped = torch.zeros_like(mask)
    if config.dual_clip is not None:
        capped = mask & (advantages < 0) & (log_ratio > math.log(config.dual_clip))
    moved = log_ratio.clamp(-20, 20).masked_fill(~mask, 0)
    return {
        "pg_clipfrac": metrics["clip_ratio/region_mean"],
        "pg_clipfrac_lower": capped.sum() / count,
        "ppo_kl": -moved.sum() / count,
    }
