"""TRL's GRPO trainer, with log-probs and entropies from hidden states: no logits are made.

The policy's, the old and the reference log-probs, and the entropy with its gradient, come from
`linear_token_stats`; the rest of the trainer, its losses, metrics and options, is TRL's. With
`fuse_loss=True` the loss's gradient comes from `linear_grpo_loss`: three products of the head where
a token's loss is its own, not four, and two of them left out for a group without a signal.

    from datasets import Dataset
    from trl import GRPOConfig

    from grpo_kernels.integrations.trl import FusedGRPOTrainer


    def digits(completions, **_):
        return [float(sum(letter.isdigit() for letter in each)) for each in completions]


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

A trainer that exists, of GRPOTrainer or a class of yours below it, takes `fuse_trainer(trainer)`.
The model's own forward runs, so PEFT, gradient checkpointing and accelerate work as in TRL. Not so
Liger's layers, images, an adapter or a copy on the head, DeepSpeed ZeRO-3, and FSDP 1: each raises.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from .transformers import name_of
from .trl_logprobs import check_inputs, score
from .trl_loss import SCORES, check_loss, fused_loss

LOSS = "_compute_loss"
# What TRL's loss asks, and the fused one answers itself.
MASKS = ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, same arguments, whose per-token log-probs and entropies are fused.

    Args:
        fuse_loss: make the gradient of the policy's loss together with it. Its value, the metrics
            and the entropy's controller stay TRL's. Where the ratio is the sequence's, or a filter
            ranks tokens, it saves only the groups without a signal. A token whose probability has
            moved, or lies off the reference's, by more than e^20 gives no gradient there, as in
            `policy_loss`.

    Raises:
        ValueError, TypeError: a setting that the fused head, or the fused loss, cannot honour.
    """

    def __init__(self, *args: Any, fuse_loss: bool = False, **keywords: Any):
        super().__init__(*args, **keywords)
        _check_trainer(self)
        _check_bases(self, fuse_loss)
        if fuse_loss:
            _check_leaves_to(FusedGRPOTrainer, self, SCORES, *MASKS)
            check_loss(self)
        self._fuse_loss = fuse_loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        plain = super()._compute_loss
        return fused_loss(self, plain, model, inputs) if self._fuse_loss else plain(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probs, entropies, aux loss) of the last `logits_to_keep` tokens, 0 on padding.

        Args:
            input_ids, attention_mask: [B, L]; batch_size: how many of the B run at a time.
            inputs: those of images, which must be None.
        """
        check_inputs(inputs)
        wanted = {"entropy": compute_entropy, "aux_loss": compute_aux_loss}
        step = batch_size or len(input_ids)
        batches = zip(input_ids.split(step), attention_mask.split(step), strict=True)
        parts = [score(self, model, *each, logits_to_keep, **wanted) for each in batches]
        logprobs, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logprobs),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )


def fuse_trainer(trainer: GRPOTrainer, *, fuse_loss: bool = False) -> GRPOTrainer:
    """Make a trainer that exists score its tokens as a FusedGRPOTrainer does.

    Args:
        trainer: a GRPOTrainer, or of a class below it that leaves the scoring to it.
        fuse_loss: as in FusedGRPOTrainer; the class must leave `_compute_loss`, and the masks and
            weights that it reads, to GRPOTrainer too.

    Returns:
        The same trainer.

    Raises:
        ValueError, TypeError: a setting that the fused head or loss cannot honour.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}")
    _check_leaves_to(GRPOTrainer, trainer, SCORES)
    _check_trainer(trainer)
    if isinstance(trainer, FusedGRPOTrainer):
        _check_bases(trainer, fuse_loss)
    if fuse_loss:
        _check_leaves_to(GRPOTrainer, trainer, LOSS, *MASKS)
        check_loss(trainer)
        plain = getattr(GRPOTrainer, LOSS).__get__(trainer)
        setattr(trainer, LOSS, partial(fused_loss, trainer, plain))
    setattr(trainer, SCORES, getattr(FusedGRPOTrainer, SCORES).__get__(trainer))
    return trainer


def _check_trainer(trainer: GRPOTrainer) -> None:
    """What would train something else than it says raises here, before the first step."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel must be False, got True: Liger's layers are not tested with the "
            "fused head, which needs none of them"
        )
    if trainer._is_vlm:
        raise ValueError(
            f"model must be one of text alone, got {type(trainer.model).__name__}, which sees "
            "images: train it with trl.GRPOTrainer"
        )
    in_parts = "outside the model's forward, where the fused head runs, its weight is in parts"
    if getattr(args.deepspeed_plugin, "zero_stage", 0) == 3:
        raise ValueError(f"zero_stage of DeepSpeed must be at most 2, got 3: {in_parts}")
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(f"fsdp_version must be 2, got 1: {in_parts}")
    head = trainer.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"the head of the model must be a linear layer, got {name_of(head)}: leave it out of "
            "an adapter's target_modules, modules_to_save and trainable_token_indices"
        )


def _check_bases(trainer: FusedGRPOTrainer, fuse_loss: bool) -> None:
    """A method of a class behind FusedGRPOTrainer would be lost."""
    order = type(trainer).__mro__
    behind = order[order.index(FusedGRPOTrainer) + 1 :]
    for name in (SCORES, LOSS) if fuse_loss else (SCORES,):
        owner = next(each for each in behind if name in vars(each))
        if owner is not GRPOTrainer:
            raise TypeError(
                f"FusedGRPOTrainer must come after {owner.__name__} among the bases of "
                f"{type(trainer).__name__}: it is in the place of {owner.__name__}'s {name}"
            )


def _check_leaves_to(base: type, trainer: GRPOTrainer, *names: str) -> None:
    """A method of the trainer's own would be lost."""
    for name in names:
        known = (getattr(GRPOTrainer, name), getattr(FusedGRPOTrainer, name))
        if getattr(type(trainer), name) not in known:
            raise TypeError(
                f"trainer must leave {name} to {base.__name__}, got {type(trainer).__name__} with "
                "its own, which would be lost"
            )
