"""TRL's GRPO trainer with fused log-probs and entropies: no logits are computed.

The log-probs of the policy, the old policy and the reference policy, and the entropy with its
gradient, come from `linear_token_stats`. The losses, metrics and options of the trainer are TRL's.
With `fuse_loss=True` the gradient of the loss comes from `linear_grpo_loss`: three matmuls of the
head per token instead of four if the loss is token-level, and one for a group with equal rewards.

    from datasets import Dataset
    from trl import GRPOConfig

    from grpo_kernels.integrations.trl import FusedGRPOTrainer


    def digits(completions, **_):
        return [float(sum(letter.isdigit() for letter in text)) for text in completions]


    config = GRPOConfig(
        output_dir="run",
        max_steps=2,
        per_device_train_batch_size=8,
        max_completion_length=16,
        temperature=0.7,
        beta=0.04,
        entropy_coef=0.001,
    )
    trainer = FusedGRPOTrainer(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        digits,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(10)]}),
        fuse_loss=True,
    )
    trainer.train()

An existing trainer, of GRPOTrainer or a subclass, is converted by `fuse_trainer(trainer)`. The
model's own forward runs, so PEFT, gradient checkpointing and accelerate work as in TRL. Liger's
layers, images, DeepSpeed ZeRO-3 and FSDP 1 raise an error. A LoRA on the head, which GRPOTrainer
refuses, is for FusedGRPOTrainer; it must have no dropout and no variant such as DoRA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from .linear_head import linear_head
from .trl_logprobs import run_model
from .trl_loss import SCORES, check_loss, fused_loss

LOSS = "_compute_loss"
# Methods that TRL's loss calls and the fused loss replaces.
MASKS = ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the same arguments and fused per-token log-probs and entropies.

    Args:
        fuse_loss: compute the gradient of the policy loss together with the loss. The value, the
            metrics and the entropy controller stay TRL's. With a sequence-level ratio, or a filter
            that ranks tokens, this saves only the groups with equal rewards. A token whose
            probability differs from the old or the reference policy's by more than a factor e^20
            has no gradient, as in `policy_loss`.

    Raises:
        ValueError, TypeError: a setting that the fused head or the fused loss does not support.
    """

    def __init__(self, *args: Any, fuse_loss: bool = False, **keywords: Any):
        with _accept_lora_on_head():
            super().__init__(*args, **keywords)
        _check_trainer(self)
        _check_base_order(self, fuse_loss)
        if fuse_loss:
            _check_not_overridden(FusedGRPOTrainer, self, SCORES, *MASKS)
            check_loss(self)
        self._fuse_loss = fuse_loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        compute_loss = super()._compute_loss
        if self._fuse_loss:
            return fused_loss(self, compute_loss, model, inputs)
        return compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (log-probs, entropies, aux loss) of the last `logits_to_keep` tokens.

        input_ids and attention_mask are [B, L]; the result is 0 on padding.
        """
        step = batch_size or len(input_ids)
        logprobs, entropies, aux_losses = [], [], []
        for ids, attention in zip(input_ids.split(step), attention_mask.split(step), strict=True):
            output = run_model(
                self, model, ids, attention, logits_to_keep, aux_loss=compute_aux_loss, **images
            )
            with output.autocast:
                stats = output.head.token_stats(
                    output.hidden,
                    output.tokens,
                    mask=(attention[:, -logits_to_keep:] != 0).to(output.hidden.device),
                    temperature=self.temperature,
                    entropy=compute_entropy,
                )
            logprobs.append(stats.logprob)
            entropies.append(stats.entropy)
            aux_losses.append(output.aux_loss)
        return (
            torch.cat(logprobs),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )


def fuse_trainer(trainer: GRPOTrainer, *, fuse_loss: bool = False) -> GRPOTrainer:
    """Make an existing trainer compute its log-probs and entropies as FusedGRPOTrainer does.

    Args:
        trainer: a GRPOTrainer, or a subclass that does not override the log-prob method.
        fuse_loss: see FusedGRPOTrainer; the class must not override `_compute_loss`, or the masks
            and weights that it reads, either.

    Returns:
        The same trainer.

    Raises:
        ValueError, TypeError: a setting that the fused head or the fused loss does not support.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}")
    _check_not_overridden(GRPOTrainer, trainer, SCORES)
    _check_trainer(trainer)
    if isinstance(trainer, FusedGRPOTrainer):
        _check_base_order(trainer, fuse_loss)
    if fuse_loss:
        _check_not_overridden(GRPOTrainer, trainer, LOSS, *MASKS)
        check_loss(trainer)
        compute_loss = getattr(GRPOTrainer, LOSS).__get__(trainer)
        setattr(trainer, LOSS, partial(fused_loss, trainer, compute_loss))
    setattr(trainer, SCORES, getattr(FusedGRPOTrainer, SCORES).__get__(trainer))
    return trainer


def _check_trainer(trainer: GRPOTrainer) -> None:
    args: Any = trainer.args  # a GRPOConfig, which transformers.Trainer does not know
    accelerator = trainer.accelerator
    zero_stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    sharded = "the fused head runs outside the model's forward, where its weight is sharded"
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel must be False, got True: Liger's layers are not tested with the "
            "fused head, which needs none of them"
        )
    if trainer._is_vlm:
        raise ValueError(
            f"model must be text-only, got {type(trainer.model).__name__}, which reads images: "
            "train it with trl.GRPOTrainer"
        )
    if zero_stage == 3:
        raise ValueError(f"zero_stage of DeepSpeed must be at most 2, got 3: {sharded}")
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(f"fsdp_version must be 2, got 1: {sharded}")
    if linear_head(trainer.model).adapter is not None and args.cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32 must be False with a LoRA on the head, got True: TRL's cast "
            "replaces the forward of the head, and leaves the adapter out"
        )


@contextmanager
def _accept_lora_on_head() -> Iterator[None]:
    """Keep TRL's constructor from refusing a LoRA on the head, which only its own loss ignores."""
    checked_class = "BaseTunerLayer"
    own = getattr(grpo_trainer, checked_class, None)
    if own is None:  # PEFT is not installed
        yield
        return
    setattr(grpo_trainer, checked_class, ())  # nothing is an instance of no class
    try:
        yield
    finally:
        setattr(grpo_trainer, checked_class, own)


def _check_base_order(trainer: FusedGRPOTrainer, fuse_loss: bool) -> None:
    """Refuse a base class after FusedGRPOTrainer whose methods FusedGRPOTrainer would hide."""
    order = type(trainer).__mro__
    behind = order[order.index(FusedGRPOTrainer) + 1 :]
    for name in (SCORES, LOSS) if fuse_loss else (SCORES,):
        owner = next(base for base in behind if name in vars(base))
        if owner is not GRPOTrainer:
            raise TypeError(
                f"FusedGRPOTrainer must come after {owner.__name__} among the bases of "
                f"{type(trainer).__name__}: it would hide {owner.__name__}'s {name}"
            )


def _check_not_overridden(base: type, trainer: GRPOTrainer, *names: str) -> None:
    """Refuse a subclass whose own version of a method would not be called."""
    for name in names:
        known = (getattr(GRPOTrainer, name), getattr(FusedGRPOTrainer, name))
        if getattr(type(trainer), name) not in known:
            raise TypeError(
                f"trainer must leave {name} to {base.__name__}, got {type(trainer).__name__} with "
                "its own, which would not be called"
            )
