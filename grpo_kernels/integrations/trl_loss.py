"""TRL's loss by us: what a GRPOConfig's settings are called here, and the loss itself.

    config = LossConfig(**loss_fields(settings))
    policy_loss(logprob, advantages, mask=mask, config=config, **loss_denominators(settings, ...))

`settings` are a GRPOConfig's by name, epsilon_high not None, and a loss_type "gmpo" that stands for
the trainer of that name among TRL's experiments. Nothing of TRL is imported. `fused_loss` is
`_compute_loss` of a trainer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..objective.policy_loss import LossConfig
from .trl_logprobs import check_inputs, run

if TYPE_CHECKING:
    from trl import GRPOTrainer

SCORES = "_get_per_token_logps_and_entropies"  # of GRPOTrainer, what its `_compute_loss` calls

OBJECTIVES: dict[str, dict[str, str]] = {
    "grpo": {"aggregation": "sequence_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "fixed_length"},
    "dapo": {"aggregation": "token_mean"},
    "luspo": {"aggregation": "sequence_sum_mean"},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean"},
    "vespo": {"surrogate": "vespo", "aggregation": "token_mean"},
    "gmpo": {"surrogate": "gmpo", "aggregation": "sequence_mean"},
}
# What TRL calls the numbers that a surrogate reads, and what they are called here.
NUMBERS: dict[str, dict[str, str]] = {
    "clip": {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high", "delta": "delta"},
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
LEAST_DECAY = 1e-4  # what a lambda of VESPO is raised to in TRL
OF_SEQUENCES = ("vespo", "gmpo")  # whose ratios are of whole sequences at either level
WINDOW = ("dapo", "cispo", "vespo")  # divided by the tokens of all that was generated at once


def loss_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the LossConfig that means what these settings do."""
    loss_type, quantile = settings["loss_type"], settings["top_entropy_quantile"]
    corrected = settings["use_bias_correction_kl"] and loss_type != "gmpo"
    fields: dict[str, Any] = OBJECTIVES[loss_type] | {
        "beta": settings["beta"],
        "kl_estimator": "k3_corrected" if corrected else "k3",
        "entropy_coef": settings["entropy_coef"],
        "top_entropy": None if quantile == 1 else quantile,
        "off_policy_threshold": settings["off_policy_mask_threshold"],
    }
    if loss_type not in OF_SEQUENCES:
        fields["ratio_level"] = settings["importance_sampling_level"]
    names = NUMBERS[fields.get("surrogate", "clip")]
    fields |= {ours: settings[name] for name, ours in names.items() if name in settings}
    for name in ("lambda_positive", "lambda_negative"):
        if name in fields:
            fields[name] = max(fields[name], LEAST_DECAY)
    if loss_type == "dr_grpo":
        fields["max_completion_length"] = settings["max_completion_length"]
    if settings["use_vllm"] and settings["vllm_importance_sampling_correction"]:
        level, mode = settings["vllm_importance_sampling_mode"].split("_")
        fields |= {"importance_level": level, "importance_mode": mode}
        fields["importance_floor"] = settings["vllm_importance_sampling_clip_min"]
        fields["importance_cap"] = settings["vllm_importance_sampling_clip_max"]
    return fields


def loss_denominators(
    settings: Mapping[str, Any],
    mask: Tensor,
    *,
    generated_tokens: int | Tensor,
    batches: float,
    accumulated: int,
) -> dict[str, Tensor | float]:
    """The denominators of a micro-batch's loss, the keywords of `policy_loss`.

    Args:
        mask: [B, T], the tokens that count.
        generated_tokens: of all that was generated at once, on each rank.
        batches: how many micro-batches that makes.
        accumulated: micro-batches whose gradients are added up before an update.
    """
    sequences, tokens = len(mask), mask.sum()
    denominators = {
        "sequence_mean": sequences,
        "token_mean": tokens,
        "fixed_length": sequences * settings["max_completion_length"],
        "sequence_sum_mean": sequences,
    }
    if settings["loss_type"] in WINDOW:
        denominator = generated_tokens / batches
    else:
        denominator = denominators[OBJECTIVES[settings["loss_type"]]["aggregation"]]
    return {"normalizer": denominator * accumulated, "entropy_normalizer": tokens * accumulated}


def fused_loss(
    trainer: "GRPOTrainer",
    compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor],
    model: nn.Module,
    inputs: dict[str, Any],
) -> Tensor:
    """The loss whose value, metrics and controller are TRL's, and whose gradient came with it.

    TRL's own `compute_loss` gets log-probs and entropies that are detached.
    """
    losses = []

    def scores(
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        check_inputs(images)
        ran = run(
            trainer, model, input_ids, attention_mask, logits_to_keep, aux_loss=compute_aux_loss
        )
        keywords = _loss_keywords(trainer, inputs, ran.hidden.device)
        with ran.precision:
            output, stats = ran.head.grpo_loss_and_stats(
                ran.hidden, ran.tokens, temperature=trainer.temperature, **keywords
            )
        losses.append(output.loss)
        logprob = stats.logprob
        if keywords["old_logprob"] is not None:  # under the tool mask too: a ratio of 1
            counts = keywords["mask"] != 0
            logprob = torch.where(counts, logprob, keywords["old_logprob"])
        return logprob, stats.entropy, ran.aux_loss

    with _replaced(trainer, SCORES, scores):
        value = compute_loss(model, inputs)
    (loss,) = losses
    return value + (loss - loss.detach())


@contextmanager
def _replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """While this lasts, owner.name is the value."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def _loss_keywords(
    trainer: "GRPOTrainer", inputs: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Those of `linear_grpo_loss`, for a micro-batch as TRL's `_compute_loss` gets it."""
    settings = _settings(trainer)
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    training = trainer.model.training
    denominators = loss_denominators(
        settings,
        mask,
        generated_tokens=inputs["num_items_in_batch"] / trainer.accelerator.num_processes,
        batches=trainer.args.steps_per_generation if training else 1,
        accumulated=trainer.current_gradient_accumulation_steps if training else 1,
    )
    old, sampling = inputs.get("old_per_token_logps"), None
    if _weighs_samples(trainer):
        sampling = inputs["sampling_per_token_logps"]
        sampling = torch.where(sampling.isnan(), old, sampling)  # not scored: of weight 1
    tensors = {
        "advantages": inputs["advantages"],
        "mask": mask,
        "old_logprob": old,
        "ref_logprob": inputs["ref_per_token_logps"] if trainer.beta != 0 else None,
        "sampling_logprob": sampling,
        **denominators,
    }
    tensors = {
        name: each.to(device) if isinstance(each, Tensor) else each
        for name, each in tensors.items()
    }
    return tensors | {"config": LossConfig(**loss_fields(settings))}


def _settings(trainer: "GRPOTrainer") -> dict[str, Any]:
    """What `loss_fields` reads: of the trainer what TRL's loss reads there, else of its arguments.

    The entropy's coefficient is that of the present step.
    """
    coef = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coef = 0.0
    now = {"epsilon": trainer.epsilon_low, "entropy_coef": coef}
    return vars(trainer.args) | vars(trainer) | now


def _weighs_samples(trainer: "GRPOTrainer") -> bool:
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


def check_loss(trainer: "GRPOTrainer") -> None:
    """What the fused loss would compute otherwise than TRL raises here."""
    without, processes = "leave fuse_loss out", trainer.accelerator.num_processes
    if trainer.loss_type not in OBJECTIVES:
        raise ValueError(
            f"fuse_loss needs a loss_type of {', '.join(OBJECTIVES)}, got {trainer.loss_type!r}: "
            f"{without}"
        )
    of_sequence = trainer.importance_sampling_level == "sequence"
    if trainer.beta != 0 and trainer.args.use_bias_correction_kl and of_sequence:
        raise ValueError(
            "use_bias_correction_kl at importance_sampling_level='sequence' corrects by the "
            f"sequence's ratio in TRL, and by each token's own in the fused loss: {without}"
        )
    if trainer.top_entropy_quantile < 1 and processes > 1:
        raise ValueError(
            f"top_entropy_quantile={trainer.top_entropy_quantile} is a quantile over all "
            f"{processes} processes in TRL, and over each one's tokens in the fused loss: {without}"
        )
    has_sampler = trainer.use_vllm or trainer.rollout_func is not None
    if trainer.off_policy_mask_threshold is not None and has_sampler:
        raise ValueError(
            "off_policy_mask_threshold with a sampler's own log-probs (use_vllm, rollout_func) "
            f"passes over the NaN among them in TRL, which the fused loss cannot: {without}"
        )
    try:
        LossConfig(**loss_fields(_settings(trainer)))
    except ValueError as error:
        raise ValueError(f"the fused loss has no such setting, {error}: {without}") from error
