"""TRL's GRPO losses as a LossConfig.

    config = loss_config(settings)
    policy_loss(logprob, advantages, mask=mask, config=config, **loss_denominators(config, ...))

`settings` are the fields of a GRPOConfig by name, with epsilon_high set. loss_type "gmpo" stands
for TRL's experimental GMPOTrainer. TRL itself is not imported.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..objective.policy_loss import LossConfig

# A loss_type of TRL is the named constructor of LossConfig; these settings of TRL are its fields.
_CLIP = {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high", "delta": "delta"}
OBJECTIVES: dict[str, dict[str, str]] = {
    "grpo": _CLIP,
    "bnpo": _CLIP,
    "dr_grpo": _CLIP | {"max_completion_length": "max_completion_length"},
    "dapo": _CLIP,
    "luspo": _CLIP,
    "cispo": {"epsilon_high": "ratio_cap"},
    "sapo": {"sapo_temperature_pos": "tau_positive", "sapo_temperature_neg": "tau_negative"},
    "vespo": {
        "vespo_k_pos": "k_positive",
        "vespo_lambda_pos": "lambda_positive",
        "vespo_k_neg": "k_negative",
        "vespo_lambda_neg": "lambda_negative",
    },
    "gmpo": {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high"},
}
MIN_DECAY = 1e-4  # TRL's lower bound of VESPO's lambdas
SEQUENCE_LEVEL = ("vespo", "gmpo")  # losses of whole sequences, whatever importance_sampling_level
WINDOW = ("dapo", "cispo", "vespo")  # divided by the tokens of all completions generated at once


def loss_config(settings: Mapping[str, Any]) -> LossConfig:
    """Return the LossConfig with the meaning of TRL's settings."""
    loss_type, quantile = settings["loss_type"], settings["top_entropy_quantile"]
    corrected = settings["use_bias_correction_kl"] and loss_type != "gmpo"
    fields: dict[str, Any] = {
        "beta": settings["beta"],
        "kl_estimator": "k3_corrected" if corrected else "k3",
        "entropy_coef": settings["entropy_coef"],
        "top_entropy": None if quantile == 1 else quantile,
        "off_policy_threshold": settings["off_policy_mask_threshold"],
    }
    if loss_type not in SEQUENCE_LEVEL:
        fields["ratio_level"] = settings["importance_sampling_level"]
    for name, field in OBJECTIVES[loss_type].items():
        if name in settings:
            is_decay = field.startswith("lambda")
            fields[field] = max(settings[name], MIN_DECAY) if is_decay else settings[name]
    if settings["use_vllm"] and settings["vllm_importance_sampling_correction"]:
        level, mode = settings["vllm_importance_sampling_mode"].split("_")
        fields |= {"importance_level": level, "importance_mode": mode}
        fields["importance_floor"] = settings["vllm_importance_sampling_clip_min"]
        fields["importance_cap"] = settings["vllm_importance_sampling_clip_max"]
    return LossConfig.objectives()[loss_type](**fields)


def loss_denominators(
    config: LossConfig,
    mask: Tensor,
    *,
    loss_type: str,
    generated_tokens: int | Tensor,
    batches: float,
    accumulated: int,
) -> dict[str, Tensor | float]:
    """Return TRL's denominators of a micro-batch's loss, as keywords of `policy_loss`.

    Args:
        config: the `loss_config` of the settings.
        mask: [B, T], True on the tokens that count.
        generated_tokens: tokens of all completions generated at once, per rank.
        batches: the number of micro-batches they make.
        accumulated: micro-batches whose gradients are added up before an update.
    """
    sequences, tokens = len(mask), mask.sum()
    if loss_type in WINDOW:
        denominator = generated_tokens / batches
    elif config.aggregation == "token_mean":
        denominator = tokens
    elif config.aggregation == "fixed_length":
        assert config.max_completion_length is not None
        denominator = sequences * config.max_completion_length
    else:
        denominator = sequences
    return {"normalizer": denominator * accumulated, "entropy_normalizer": tokens * accumulated}
