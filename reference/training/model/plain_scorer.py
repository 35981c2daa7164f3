"""A Hugging Face causal language model with its logits: the twin of the fused integration.

The states that its `forward` returns are the logits themselves, and its head only scores them.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from reference.losses.grpo_loss import grpo_loss
from reference.losses.policy_loss import LossOutput
from reference.losses.token_stats import TokenStats, token_stats


class Head:
    """Scores logits."""

    def token_stats(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        ref_head: "Head | None" = None,
        **keywords: Any,
    ) -> TokenStats:
        """`token_stats` of the logits `hidden`."""
        keywords = _without_hidden(keywords)
        return token_stats(hidden, tokens, temperature=temperature, **keywords)

    def grpo_loss(
        self,
        hidden: Tensor,
        tokens: Tensor,
        advantages: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        ref_head: "Head | None" = None,
        **keywords: Any,
    ) -> LossOutput:
        """`grpo_loss` of the logits `hidden`."""
        keywords = _without_hidden(keywords)
        return grpo_loss(hidden, tokens, advantages, temperature=temperature, **keywords)


class Forward(NamedTuple):
    """The logits [B, L, V], in the place of hidden states, the head, and the model's output."""

    hidden: Tensor
    head: Head
    output: Any


def forward(model: nn.Module, **inputs: Any) -> Forward:
    """Run a causal language model, whose logits stand for its hidden states."""
    output = model(**inputs)
    return Forward(output.logits, Head(), output)


def _without_hidden(keywords: dict[str, Any]) -> dict[str, Any]:
    """The names of the logits level, without what is of the hidden level only."""
    renamed = {"ref_hidden": "ref_logits"}
    left_out = ("chunk_tokens", "packing")
    return {renamed.get(name, name): v for name, v in keywords.items() if name not in left_out}
