"""TRL's `_compute_loss` with the gradient of `linear_grpo_loss`."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from .trl_loss import OBJECTIVES, loss_config, loss_denominators
from .trl_seam import adapted_model, lm_head, scored_by

# The methods of GRPOTrainer that `_compute_loss` calls.
SCORES = "_get_per_token_logps_and_entropies"
MASKS = ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")


def loss_owner(trainer: GRPOTrainer) -> type:
    """Return the class of TRL whose `_compute_loss` the fused loss stands for."""
    module: Any = sys.modules.get("trl.experimental.gmpo")  # loaded if there is such a trainer
    if module is not None and isinstance(trainer, module.GMPOTrainer):
        return module.GMPOTrainer
    return GRPOTrainer


def fused_loss(
    trainer: GRPOTrainer,
    compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor],
    model: nn.Module,
    inputs: dict[str, Any],
) -> Tensor:
    """Return TRL's loss with the gradient of `linear_grpo_loss`.

    TRL's own methods run the model, where its log-prob function is replaced by the fused loss of
    this micro-batch. Its `compute_loss` gets detached log-probs and entropies. It computes the
    value and the metrics, and updates the entropy controller.
    """
    carriers, head_of = [], adapted_model(model)
    keep = inputs["completion_mask"] != 0

    def loss_of_labelled_tokens(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        keywords = _loss_keywords(trainer, inputs, keep, hidden.device)
        with lm_head(weight, bias, scale, softcap, head_of) as head:
            loss_output, stats = head.grpo_loss_and_stats(
                hidden, targets, temperature=temperature, **keywords
            )
        logprob = _CarryLoss.apply(stats.logprob, loss_output.loss)
        return logprob, stats.entropy, None, None, None

    def score(model: nn.Module, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        scores = getattr(GRPOTrainer, SCORES)
        with scored_by(loss_of_labelled_tokens, head_of):
            logprob, entropy, aux_loss = scores(trainer, model, *arguments, **keywords)
        carriers.append(logprob)
        logprob, old = logprob.detach(), inputs.get("old_per_token_logps")
        if old is not None and "tool_mask" in inputs:  # a ratio of 1 where tool_mask is 0
            logprob = torch.where(keep & (inputs["tool_mask"] != 0), logprob, old)
        return logprob, entropy, aux_loss

    own = vars(trainer).get(SCORES)  # set by `fuse_trainer`
    setattr(trainer, SCORES, score)
    try:
        value = compute_loss(model, inputs)
    finally:
        delattr(trainer, SCORES) if own is None else setattr(trainer, SCORES, own)
    (carrier,) = carriers
    return value + _LossOf.apply(carrier).to(value.device)


class _CarryLoss(torch.autograd.Function):
    """Let the gradient of a loss flow through log-probs, so that it leaves a model by its output.

    DistributedDataParallel, FSDP and DeepSpeed search the outputs of a model for its graph.
    """

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, loss: Tensor) -> Tensor:
        return logprob.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Each log-prob brings the gradient of the loss."""
        return None, grad[0] if len(grad) else grad.new_zeros(())


class _LossOf(torch.autograd.Function):
    """0 with the gradient of the loss that the log-probs carry."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor) -> Tensor:
        ctx.like = torch.empty_like(logprob, device="meta")
        ctx.device = logprob.device
        return logprob.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.like.shape)


def _loss_keywords(
    trainer: GRPOTrainer, inputs: dict[str, Any], keep: Tensor, device: torch.device
) -> dict[str, Any]:
    """Return the keywords of `linear_grpo_loss` for a micro-batch of TRL's `_compute_loss`.

    The tokens are packed: those of the completions [B, T] that `keep` holds.
    """
    settings = _settings(trainer)
    config = loss_config(settings)
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    args: Any = trainer.args  # a GRPOConfig, which transformers.Trainer does not know
    model: Any = trainer.model
    advantages = inputs["advantages"]
    per_token = {
        "advantages": advantages if advantages.dim() == 2 else advantages[:, None].expand_as(mask),
        "mask": mask,
        "old_logprob": inputs.get("old_per_token_logps"),
        "ref_logprob": inputs["ref_per_token_logps"] if trainer.beta != 0 else None,
    }
    if settings["use_vllm"] and settings["vllm_importance_sampling_correction"]:
        sampling = inputs["sampling_per_token_logps"]
        # vLLM did not score the NaN tokens: a weight of 1.
        per_token["sampling_logprob"] = torch.where(
            sampling.isnan(), per_token["old_logprob"], sampling
        )
    lengths = keep.sum(1)
    keywords = {name: x if x is None else x[keep] for name, x in per_token.items()}
    keywords["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    keywords |= loss_denominators(
        config,
        mask,
        loss_type=settings["loss_type"],
        generated_tokens=inputs["num_items_in_batch"] / trainer.accelerator.num_processes,
        batches=args.steps_per_generation if model.training else 1,
        accumulated=trainer.current_gradient_accumulation_steps if model.training else 1,
    )
    keywords = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in keywords.items()
    }
    return keywords | {"config": config, "per_sequence": advantages.dim() == 1}


def _settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """Return the settings for `loss_config`, from the trainer's attributes before its arguments.

    TRL's loss reads the same attributes. entropy_coef is that of the current step.
    """
    args: Any = trainer.args
    coef = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > args.entropy_target:
        coef = 0.0
    current = {"epsilon": trainer.epsilon_low, "entropy_coef": coef}
    if loss_owner(trainer) is not GRPOTrainer:  # GMPOTrainer, whose loss reads none of them
        current |= {"loss_type": "gmpo", "entropy_coef": 0.0, "off_policy_mask_threshold": None}
        current["use_vllm"] = False
    return vars(args) | vars(trainer) | current


def check_loss(trainer: GRPOTrainer) -> None:
    """Raise a ValueError for settings where the fused loss would differ from TRL's."""
    args: Any = trainer.args
    settings = _settings(trainer)
    loss_type, processes = settings["loss_type"], trainer.accelerator.num_processes
    has_sampler = trainer.use_vllm or trainer.rollout_func is not None
    refusals = (
        (
            loss_type not in OBJECTIVES,
            f"fuse_loss needs a loss_type of {', '.join(OBJECTIVES)}, got {loss_type!r}",
        ),
        (
            trainer.beta != 0
            and loss_type != "gmpo"
            and args.use_bias_correction_kl
            and trainer.importance_sampling_level == "sequence",
            "use_bias_correction_kl at importance_sampling_level='sequence' corrects by the "
            "sequence's ratio in TRL, and by each token's own in the fused loss",
        ),
        (
            trainer.top_entropy_quantile < 1 and loss_type == "gmpo",
            f"top_entropy_quantile={trainer.top_entropy_quantile} drops tokens from the geometric "
            "mean of TRL's GMPOTrainer, and from the sum over its tokens in the fused loss",
        ),
        (
            trainer.top_entropy_quantile < 1 and processes > 1,
            f"top_entropy_quantile={trainer.top_entropy_quantile} is a quantile over all "
            f"{processes} processes in TRL, and over each one's tokens in the fused loss",
        ),
        (
            settings["off_policy_mask_threshold"] is not None and has_sampler,
            "off_policy_mask_threshold with a sampler's own log-probs (use_vllm, rollout_func) "
            "ignores their NaN in TRL, which the fused loss cannot",
        ),
    )
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(f"{message}: leave fuse_loss out")
    try:
        loss_config(settings)
    except ValueError as error:
        message = f"the fused loss has no such setting, {error}: leave fuse_loss out"
        raise ValueError(message) from error
