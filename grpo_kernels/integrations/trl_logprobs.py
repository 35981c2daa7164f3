"""Run a model without its head in TRL's trainer."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .transformers import LMHead, forward_to_hidden

if TYPE_CHECKING:
    from trl import GRPOTrainer


class ModelOutput(NamedTuple):
    """Output of a model on [B, L] tokens, of which the last T are the completion.

    Attributes:
        hidden: [B, T, H], the hidden states that predict `tokens`.
        tokens: [B, T].
        head: the model's head.
        autocast: the context for the matmuls of the head.
        aux_loss: the router's auxiliary loss, or None.
    """

    hidden: Tensor
    tokens: Tensor
    head: LMHead
    autocast: AbstractContextManager
    aux_loss: Tensor | None


def run_model(
    trainer: "GRPOTrainer",
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    T: int,
    *,
    aux_loss: bool,
    **images: Any,
) -> ModelOutput:
    """Run a model to its hidden states, in the precision of TRL's trainer.

    images: TRL's inputs other than text, which must all be None.

    Raises:
        ValueError: there is an image; `aux_loss` is wanted of a model that has none.
    """
    for name, value in images.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None, got {type(value).__name__}: the fused log-probs support "
                "text only, so train on images with trl.GRPOTrainer"
            )
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if aux_loss:
        inputs["output_router_logits"] = True
    with trainer.accelerator.autocast():
        hidden, head, output = forward_to_hidden(model, **inputs)
    router_loss = getattr(output, "aux_loss", None) if aux_loss else None
    if aux_loss and router_loss is None:
        raise ValueError(
            "router_aux_loss_coef needs a model whose output has an aux_loss, got none from "
            f"{type(model).__name__}: set it to 0"
        )
    # Like TRL, on the device of the head: a model may be spread over devices.
    hidden = hidden[:, -T - 1 : -1].to(head.weight.device)
    autocast = trainer.accelerator.autocast()
    args: Any = trainer.args  # a GRPOConfig, which transformers.Trainer does not know
    if args.cast_lm_head_to_fp32:
        hidden, head = hidden.float(), head.in_fp32()
        autocast = torch.autocast(hidden.device.type, enabled=False)
    tokens = input_ids[:, -T:].to(hidden.device)
    return ModelOutput(hidden, tokens, head, autocast, router_loss)
