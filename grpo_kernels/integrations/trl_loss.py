"""TRL's GRPO losses as a LossConfig, and TRL's `_compute_loss` with a fused gradient.

    config = loss_config(settings)
    policy_loss(logprob, advantages, mask=mask, config=config, **loss_denominators(config, ...))

`settings` are the fields of a GRPOConfig by name, with epsilon_high set. loss_type "gmpo" stands
for TRL's experimental GMPOTrainer. TRL itself is not imported.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..objective.policy_loss import LossConfig
from .trl_logprobs import run_model

if TYPE_CHECKING:
    from trl import GRPOTrainer

# The method of GRPOTrainer that `_compute_loss` calls.
SCORES = "_get_per_token_logps_and_entropies"

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


def fused_loss(
    trainer: "GRPOTrainer",
    compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor],
    model: nn.Module,
    inputs: dict[str, Any],
) -> Tensor:
    """Return TRL's loss with the gradient of `linear_grpo_loss`.

    TRL's own `compute_loss` gets detached log-probs and entropies. It computes the value and the
    metrics, and updates the entropy controller.
    """
    losses = []

    def score_and_compute_loss(
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = (input_ids, attention_mask, logits_to_keep)
        output = run_model(trainer, model, *tokens, aux_loss=compute_aux_loss, **images)
        keywords = _loss_keywords(trainer, inputs, output.hidden.device)
        with output.autocast:
            loss_output, stats = output.head.grpo_loss_and_stats(
                output.hidden, output.tokens, temperature=trainer.temperature, **keywords
            )
        losses.append(loss_output.loss)
        logprob = stats.logprob
        if keywords["old_logprob"] is not None:  # a ratio of 1 where tool_mask is 0
            logprob = torch.where(keywords["mask"] != 0, logprob, keywords["old_logprob"])
        return logprob, stats.entropy, output.aux_loss

    own = vars(trainer).get(SCORES)  # set by `fuse_trainer`
    setattr(trainer, SCORES, score_and_compute_loss)
    try:
        value = compute_loss(model, inputs)
    finally:
        delattr(trainer, SCORES) if own is None else setattr(trainer, SCORES, own)
    (loss,) = losses
    return value + (loss - loss.detach())


def _loss_keywords(
    trainer: "GRPOTrainer", inputs: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return the keywords of `linear_grpo_loss` for a micro-batch of TRL's `_compute_loss`."""
    config = loss_config(_settings(trainer))
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    args: Any = trainer.args  # a GRPOConfig, which transformers.Trainer does not know
    model: Any = trainer.model
    keywords = {
        "advantages": inputs["advantages"],
        "mask": mask,
        "old_logprob": inputs.get("old_per_token_logps"),
        "ref_logprob": inputs["ref_per_token_logps"] if trainer.beta != 0 else None,
    }
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        sampling = inputs["sampling_per_token_logps"]
        # vLLM did not score the NaN tokens: a weight of 1.
        sampling = torch.where(sampling.isnan(), keywords["old_logprob"], sampling)
        keywords["sampling_logprob"] = sampling
    keywords |= loss_denominators(
        config,
        mask,
        loss_type=trainer.loss_type,
        generated_tokens=inputs["num_items_in_batch"] / trainer.accelerator.num_processes,
        batches=args.steps_per_generation if model.training else 1,
        accumulated=trainer.current_gradient_accumulation_steps if model.training else 1,
    )
    keywords = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in keywords.items()
    }
    return keywords | {"config": config}


def _settings(trainer: "GRPOTrainer") -> dict[str, Any]:
    """Return the settings for `loss_config`, from the trainer's attributes before its arguments.

    TRL's loss reads the same attributes. entropy_coef is that of the current step.
    """
    args: Any = trainer.args
    coef = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > args.entropy_target:
        coef = 0.0
    current = {"epsilon": trainer.epsilon_low, "entropy_coef": coef}
    return vars(args) | vars(trainer) | current


def check_loss(trainer: "GRPOTrainer") -> None:
    """Raise a ValueError for settings where the fused loss would differ from TRL's."""
    args: Any = trainer.args
    processes = trainer.accelerator.num_processes
    has_sampler = trainer.use_vllm or trainer.rollout_func is not None
    refusals = (
        (
            trainer.loss_type not in OBJECTIVES,
            f"fuse_loss needs a loss_type of {', '.join(OBJECTIVES)}, got {trainer.loss_type!r}",
        ),
        (
            trainer.beta != 0
            and args.use_bias_correction_kl
            and trainer.importance_sampling_level == "sequence",
            "use_bias_correction_kl at importance_sampling_level='sequence' corrects by the "
            "sequence's ratio in TRL, and by each token's own in the fused loss",
        ),
        (
            trainer.top_entropy_quantile < 1 and processes > 1,
            f"top_entropy_quantile={trainer.top_entropy_quantile} is a quantile over all "
            f"{processes} processes in TRL, and over each one's tokens in the fused loss",
        ),
        (
            trainer.off_policy_mask_threshold is not None and has_sampler,
            "off_policy_mask_threshold with a sampler's own log-probs (use_vllm, rollout_func) "
            "ignores their NaN in TRL, which the fused loss cannot",
        ),
    )
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(f"{message}: leave fuse_loss out")
    try:
        loss_config(_settings(trainer))
    except ValueError as error:
        message = f"the fused loss has no such setting, {error}: leave fuse_loss out"
        raise ValueError(message) from error
