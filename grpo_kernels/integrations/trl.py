"""TRL's GRPO trainer, with log-probs and entropies from hidden states: no logits are made.

The policy's, the old and the reference log-probs, and the entropy with its gradient, come from
`linear_token_stats`; the rest of the trainer, its losses, metrics and options, is TRL's.

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
    )
    trainer.train()

A trainer that exists, of GRPOTrainer or a class of yours below it, takes `fuse_trainer(trainer)`.
The model's own forward runs, so PEFT, gradient checkpointing and accelerate work as in TRL. Not so
Liger's layers, images, an adapter or a copy on the head, DeepSpeed ZeRO-3, and FSDP 1: each raises.
"""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from . import causal_lm


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, same arguments, whose per-token log-probs and entropies are fused.

    Raises:
        ValueError, TypeError: a setting that the fused head cannot honour.
    """

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        _check_trainer(self)

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
        _check_inputs(inputs)
        wanted = {"entropy": compute_entropy, "aux_loss": compute_aux_loss}
        step = batch_size or len(input_ids)
        batches = zip(input_ids.split(step), attention_mask.split(step), strict=True)
        parts = [_score(self, model, *each, logits_to_keep, **wanted) for each in batches]
        logprobs, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logprobs),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )


def fuse_trainer(trainer: GRPOTrainer) -> GRPOTrainer:
    """Make a trainer that exists score its tokens as a FusedGRPOTrainer does.

    Args:
        trainer: a GRPOTrainer, or of a class below it that leaves the scoring to it.

    Returns:
        The same trainer.

    Raises:
        ValueError, TypeError: a setting that the fused head cannot honour.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}")
    name = "_get_per_token_logps_and_entropies"
    fused = getattr(FusedGRPOTrainer, name)
    if getattr(type(trainer), name) not in (getattr(GRPOTrainer, name), fused):
        raise TypeError(
            f"trainer must leave {name} to GRPOTrainer, got {type(trainer).__name__} with its own, "
            "which would be lost"
        )
    _check_trainer(trainer)
    setattr(trainer, name, fused.__get__(trainer))
    return trainer


def _score(
    trainer: GRPOTrainer,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    T: int,
    *,
    entropy: bool,
    aux_loss: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Those of one micro-batch [B, L], of which the last T tokens are the completion."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if aux_loss:
        inputs["output_router_logits"] = True
    with trainer.accelerator.autocast():
        hidden, head, output = causal_lm.forward(model, **inputs)
    # As in TRL, where the head is: a model may be spread over devices.
    hidden = hidden[:, -T - 1 : -1].to(head.weight.device)
    precision = trainer.accelerator.autocast()
    if trainer.args.cast_lm_head_to_fp32:
        hidden, precision = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
    with precision:
        stats = head.token_stats(
            hidden,
            input_ids[:, -T:].to(hidden.device),
            mask=(attention_mask[:, -T:] != 0).to(hidden.device),
            temperature=trainer.temperature,
            entropy=entropy,
        )
    return stats.logprob, stats.entropy, _aux_loss_of(output, model) if aux_loss else None


def _aux_loss_of(output: Any, model: nn.Module) -> Tensor:
    found = getattr(output, "aux_loss", None)
    if found is None:
        raise ValueError(
            "router_aux_loss_coef needs a model whose output has an aux_loss, got none from "
            f"{type(model).__name__}: set it to 0"
        )
    return found


def _check_inputs(inputs: dict[str, Any]) -> None:
    """Of what the trainer passes besides text, nothing is known here."""
    for name, value in inputs.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None, got {type(value).__name__}: the fused log-probs are those "
                "of text alone, so train on images with trl.GRPOTrainer"
            )


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
            f"the head of the model must be a linear layer, got {type(head).__name__}: take it out "
            "of the adapter's target_modules and modules_to_save"
        )
