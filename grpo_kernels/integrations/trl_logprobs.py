"""A model without its head under TRL's trainer, and what the fused head says of its tokens."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import transformers as causal_lm

if TYPE_CHECKING:
    from trl import GRPOTrainer


class Ran(NamedTuple):
    """A model that ran but for its head on [B, L], of which the last T tokens are the completion.

    `hidden` [B, T, H] predicts `tokens` [B, T]; `precision` is the context for the head's products.
    """

    hidden: Tensor
    tokens: Tensor
    head: causal_lm.Head
    precision: AbstractContextManager
    aux_loss: Tensor | None


def run(
    trainer: "GRPOTrainer",
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    T: int,
    *,
    aux_loss: bool,
) -> Ran:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if aux_loss:
        inputs["output_router_logits"] = True
    with trainer.accelerator.autocast():
        hidden, head, output = causal_lm.forward(model, **inputs)
    # As in TRL, where the head is: a model may be spread over devices.
    hidden = hidden[:, -T - 1 : -1].to(head.weight.device)
    precision = trainer.accelerator.autocast()
    if trainer.args.cast_lm_head_to_fp32:
        hidden, head = hidden.float(), head.in_fp32()
        precision = torch.autocast(hidden.device.type, enabled=False)
    tokens = input_ids[:, -T:].to(hidden.device)
    return Ran(hidden, tokens, head, precision, _aux_loss_of(output, model) if aux_loss else None)


def score(
    trainer: "GRPOTrainer",
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    T: int,
    *,
    entropy: bool,
    aux_loss: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log-probs, entropies, aux loss) of one micro-batch."""
    ran = run(trainer, model, input_ids, attention_mask, T, aux_loss=aux_loss)
    with ran.precision:
        stats = ran.head.token_stats(
            ran.hidden,
            ran.tokens,
            mask=(attention_mask[:, -T:] != 0).to(ran.hidden.device),
            temperature=trainer.temperature,
            entropy=entropy,
        )
    return stats.logprob, stats.entropy, ran.aux_loss


def _aux_loss_of(output: Any, model: nn.Module) -> Tensor:
    found = getattr(output, "aux_loss", None)
    if found is None:
        raise ValueError(
            "router_aux_loss_coef needs a model whose output has an aux_loss, got none from "
            f"{type(model).__name__}: set it to 0"
        )
    return found


def check_inputs(inputs: dict[str, Any]) -> None:
    """Of what the trainer passes besides text, nothing is known here."""
    for name, value in inputs.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None, got {type(value).__name__}: the fused log-probs are those "
                "of text alone, so train on images with trl.GRPOTrainer"
            )
