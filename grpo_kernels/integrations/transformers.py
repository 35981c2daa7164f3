"""A Hugging Face causal language model up to its last hidden state, and its head through us.

    hidden, head, _ = forward(model, input_ids=ids, attention_mask=attention)
    loss, metrics = head.grpo_loss(hidden[:, :-1], ids[:, 1:], advantages, mask=mask)

The model's own forward runs, with every wrapper around it (PEFT, FSDP, checkpointing); only its
head is taken out, by hooks: it is given no positions, so that no logits are made.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lm_head.token_order import TokenPacking
from ..objective.policy_loss import LossOutput
from ..ops.linear_grpo_loss import linear_grpo_loss, linear_grpo_loss_and_stats
from ..ops.linear_token_stats import linear_token_stats
from ..ops.token_stats import TokenStats


@dataclass(frozen=True)
class Head:
    """What turns a model's hidden states into logits.

        logits = softcap · tanh(scale · (hidden @ weight.T + bias) / softcap)

    Without a softcap they are scale · (hidden @ weight.T + bias).

    Attributes:
        weight: [V, H]; bias: [V] or None.
        scale: Granite, Cohere, Falcon-H1 and others multiply their logits.
        softcap: of Gemma and others; None: no cap.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def token_stats(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        ref_head: "Head | None" = None,
        **keywords: Any,
    ) -> TokenStats:
        """`linear_token_stats` of this head; `ref_head` is that of `ref_hidden`."""
        settings = self._settings(temperature) | self._reference(ref_head)
        return linear_token_stats(hidden, self.weight, tokens, **settings, **keywords)

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
        """`linear_grpo_loss` of this head; `ref_head` is that of `ref_hidden`."""
        settings = self._settings(temperature) | self._reference(ref_head)
        return linear_grpo_loss(hidden, self.weight, tokens, advantages, **settings, **keywords)

    def grpo_loss_and_stats(
        self,
        hidden: Tensor,
        tokens: Tensor,
        advantages: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        **keywords: Any,
    ) -> tuple[LossOutput, TokenStats]:
        """`grpo_loss`, and the detached log-probs and entropies of its tokens, 0 where masked."""
        settings = self._settings(temperature)
        return linear_grpo_loss_and_stats(
            hidden, self.weight, tokens, advantages, **settings, **keywords
        )

    def in_fp32(self) -> "Head":
        bias = None if self.bias is None else self.bias.float()
        return replace(self, weight=self.weight.float(), bias=bias)

    def _settings(self, temperature: float | Tensor) -> dict[str, Any]:
        """The scale goes into the temperature, and out of the softcap."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"bias": self.bias, "temperature": temperature / self.scale, "softcap": softcap}

    def _reference(self, ref_head: "Head | None") -> dict[str, Tensor | None]:
        if ref_head is None:
            return {}
        if (ref_head.scale, ref_head.softcap) != (self.scale, self.softcap):
            raise ValueError(
                "ref_head must have the scale and softcap of the head, "
                f"{self.scale} and {self.softcap}, got {ref_head.scale} and {ref_head.softcap}"
            )
        return {"ref_weight": ref_head.weight, "ref_bias": ref_head.bias}


class Forward(NamedTuple):
    """The last hidden states [B, L, H], with gradient, the head that reads them, and the output.

    `output` is the model's own, for its cache; its logits are empty or meaningless.
    """

    hidden: Tensor
    head: Head
    output: Any


def forward(model: nn.Module, **inputs: Any) -> Forward:
    """Run a causal language model but for its head.

    What the model does to its logits, a scale or a softcap, is measured on its first call: the head
    then answers with a few known numbers, and the model's own code shows what becomes of them. No
    table of model families can be out of date.

    Args:
        model: a transformers model with a language-model head, wrapped or not.
        inputs: what its forward takes: input_ids, attention_mask, position_ids, past_key_values,
            logits_to_keep, ...; no labels.

    Raises:
        TypeError: the model has no head, or it is no plain linear layer (a LoRA on it, say).
        NotImplementedError: its logits are more than scaled and capped.
    """
    return forward_by(model, getattr(model, "module", model), inputs)  # of DistributedDataParallel


def forward_by(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> Forward:
    """`forward` of a model that nothing wraps, by what runs it: itself, a wrapper, its method."""
    layer, name = linear_head(model), type(model).__name__
    unknown = layer not in _MEASURED
    with _head_taken_out(layer, probed=unknown) as seen:
        output = call(**inputs)
    if unknown:
        _MEASURED[layer] = _measure(output.logits, layer.out_features, name)
    return Forward(seen[0], Head(layer.weight, layer.bias, *_MEASURED[layer]), output)


def linear_head(model: nn.Module) -> nn.Linear:
    """The layer that makes a model's logits.

    Raises:
        TypeError: there is none, or it is no plain linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        name = type(model).__name__
        raise TypeError(f"the head of {name} must be a linear layer, got {name_of(layer)}")
    return layer


def name_of(layer: nn.Module | None) -> str:
    """With its module: PEFT has a Linear of its own."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def causal_lm_token_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = True,
    ref_model: nn.Module | None = None,
    kl: str | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
    **inputs: Any,
) -> TokenStats:
    """Log-prob, entropy and KL of every token of a text after its first, under a model.

    Args:
        model: a transformers causal language model.
        input_ids: [B, L]; attention_mask: [B, L], 0 on padding, None for no padding.
        mask: [B, L - 1], True on the tokens input_ids[:, 1:] to score, such as the completion's;
            None: all that the attention mask has, predicted from one that it has.
        temperature: > 0, a number or [B, L - 1].
        ref_model: the reference for `kl`, "forward" or "reverse"; run without gradient.
        inputs: others of the model's forward.
        entropy, chunk_tokens, packing: as in `linear_token_stats`.

    Returns:
        TokenStats, [B, L - 1], aligned with input_ids[:, 1:], differentiable in the parameters of
        the model.

    Raises:
        TypeError, NotImplementedError: as `forward`. ValueError: as `linear_token_stats`.
    """
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    if mask is None and attention_mask is not None:
        mask = (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    hidden, head, _ = forward(model, **inputs)
    reference = {}
    if ref_model is not None:
        with torch.no_grad():
            ref_hidden, ref_head, _ = forward(ref_model, **inputs)
        reference = {"ref_hidden": ref_hidden[:, :-1], "ref_head": ref_head}
    return head.token_stats(
        hidden[:, :-1],
        input_ids[:, 1:],
        temperature=temperature,
        entropy=entropy,
        kl=kl,
        mask=mask,
        chunk_tokens=chunk_tokens,
        packing=packing,
        **reference,
    )


# (scale, softcap) by head.
_MEASURED: weakref.WeakKeyDictionary[nn.Linear, tuple[float, float | None]]
_MEASURED = weakref.WeakKeyDictionary()
# 0 shows an offset, 1 the scale, an enormous number the cap, 40 the way to it.
_PROBE = (0.0, 1.0, 40.0, 1e30)


@contextmanager
def _head_taken_out(layer: nn.Linear, *, probed: bool):
    """While this lasts the layer notes its input, and answers for no position, or a probe."""
    seen = []

    def before(_, arguments):
        seen.append(arguments[0])
        return (arguments[0][..., :0, :], *arguments[1:])

    def after(_, arguments, output):
        if not probed:
            return output
        dtype = torch.float32 if output.is_mps else torch.float64  # of which MPS has none
        probe = torch.tensor(_PROBE, dtype=dtype, device=output.device)
        # The sum of nothing keeps the graph whole: DistributedDataParallel looks through it for
        # parameters without a gradient.
        return probe[None, :, None].expand(1, -1, output.shape[-1]) + output.sum()

    handles = layer.register_forward_pre_hook(before), layer.register_forward_hook(after)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _measure(logits: Tensor, V: int, name: str) -> tuple[float, float | None]:
    """(scale, softcap) from what became of the probe [1, 4, V]."""
    whole = logits.shape == (1, len(_PROBE), V)
    one_function = whole and bool((logits == logits[..., :1]).all())
    seen = logits[0, :, 0].tolist() if one_function else (math.nan,) * len(_PROBE)
    offset, at_one, at_some, largest = seen
    near = partial(math.isclose, rel_tol=1e-2)  # of a model that rounds its logits to bf16
    if near(largest, at_one * _PROBE[3]):
        scale, softcap, expected = at_one, None, at_one * _PROBE[2]
    else:
        softcap = largest
        scale = softcap * math.atanh(at_one / softcap) if 0 < at_one < softcap else math.nan
        scale = round(scale, 12 if logits.dtype == torch.float64 else 6)
        expected = softcap * math.tanh(scale * _PROBE[2] / softcap)
    if offset != 0 or not scale > 0 or not near(at_some, expected):
        raise NotImplementedError(
            f"{name} does more to its logits than a scale and a softcap: take its logits, and "
            "token_stats or grpo_loss"
        )
    return scale, softcap
