"""Hugging Face causal language models: run the model to its last hidden state, apply the head here.

    hidden, head, _ = forward_to_hidden(model, input_ids=ids, attention_mask=attention)
    loss, metrics = head.grpo_loss(hidden[:, :-1], ids[:, 1:], advantages, mask=mask)

With PEFT, the model without its adapters is the reference policy of a KL:

    with torch.no_grad(), model.disable_adapter():
        ref_hidden, ref_head, _ = forward_to_hidden(model, input_ids=ids, attention_mask=attention)
    reference = {"ref_hidden": ref_hidden[:, :-1], "ref_head": ref_head}
    head.grpo_loss(hidden[:, :-1], ids[:, 1:], advantages, mask=mask, config=config, **reference)

The model's own forward runs, with every wrapper around it (PEFT, FSDP, checkpointing). Hooks on the
LM head record its input and pass it zero positions, so no logits are computed.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lm_head.inputs import HeadAdapter, prepare_inputs
from ..lm_head.token_order import pack_tokens
from ..objective.policy_loss import LossOutput, prepare_loss_inputs
from ..ops.linear_grpo_loss import linear_grpo_loss, loss_and_stats
from ..ops.linear_token_stats import linear_token_stats
from ..ops.token_stats import TokenStats
from ..validation import expect_number
from .linear_head import head_layer, linear_head


@dataclass(frozen=True)
class LMHead:
    """The head of a language model: turns hidden states into logits.

        x = hidden @ weight.T + bias + adapter.scale · (hidden @ adapter.a.T) @ adapter.b.T
        logits = softcap · tanh(scale · x / softcap)

    Without a softcap, logits = scale · x.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        adapter: a LoRA on the head, or None.
        scale: factor of the logits, as in Granite, Cohere and Falcon-H1.
        softcap: bound of the logits, as in Gemma, or None.
    """

    weight: Tensor
    bias: Tensor | None
    adapter: HeadAdapter | None
    scale: float
    softcap: float | None

    def token_stats(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        ref_head: "LMHead | None" = None,
        **keywords: Any,
    ) -> TokenStats:
        """Call `linear_token_stats` with this head; `ref_head` is the head of `ref_hidden`."""
        head = self._keywords(temperature, ref_head)
        return linear_token_stats(hidden, self.weight, tokens, **head, **keywords)

    def grpo_loss(
        self,
        hidden: Tensor,
        tokens: Tensor,
        advantages: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        ref_head: "LMHead | None" = None,
        **keywords: Any,
    ) -> LossOutput:
        """Call `linear_grpo_loss` with this head; `ref_head` is the head of `ref_hidden`."""
        head = self._keywords(temperature, ref_head)
        return linear_grpo_loss(hidden, self.weight, tokens, advantages, **head, **keywords)

    def grpo_loss_and_stats(
        self,
        hidden: Tensor,
        tokens: Tensor,
        advantages: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        mask: Tensor | None = None,
        per_sequence: bool = False,
        **keywords: Any,
    ) -> tuple[LossOutput, TokenStats]:
        """Like `grpo_loss`; also return the detached log-probs and entropies, 0 where masked.

        Args:
            per_sequence: all tokens of a sequence have one advantage.
            keywords: those of `prepare_loss_inputs`.
        """
        head = self._keywords(temperature, None)
        inputs = prepare_inputs(hidden, self.weight, tokens, mask=mask, **head)
        prepared = prepare_loss_inputs(
            tokens, inputs.temperature.dtype, advantages, mask=mask, **keywords
        )
        packing = pack_tokens(prepared.sequences.keep, prepared.inputs.advantage)
        return loss_and_stats(hidden, inputs, prepared, packing, per_sequence=per_sequence)

    def in_fp32(self) -> "LMHead":
        bias, adapter = self.bias, self.adapter
        return replace(
            self,
            weight=self.weight.float(),
            bias=None if bias is None else bias.float(),
            adapter=adapter and adapter._replace(a=adapter.a.float(), b=adapter.b.float()),
        )

    def _keywords(self, temperature: float | Tensor, ref_head: "LMHead | None") -> dict[str, Any]:
        """Express the scale through temperature and softcap; add the reference policy's head."""
        if not isinstance(temperature, (Tensor, float, int)):
            expect_number("temperature", temperature, above=0)  # else the division would raise
        keywords = {
            "bias": self.bias,
            "adapter": self.adapter,
            "temperature": temperature / self.scale,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
        }
        if ref_head is None:
            return keywords
        if not isinstance(ref_head, LMHead):
            raise TypeError(f"ref_head must be an LMHead, got {type(ref_head).__name__}")
        if (ref_head.scale, ref_head.softcap) != (self.scale, self.softcap):
            raise ValueError(
                "ref_head must have the scale and softcap of the head, "
                f"{self.scale} and {self.softcap}, got {ref_head.scale} and {ref_head.softcap}"
            )
        if ref_head.adapter is not None:
            raise ValueError(
                "ref_head must have no adapter, got one: merge it into the weight, with PEFT's "
                "merge_adapter(), or disable it, before the reference policy runs"
            )
        return keywords | {"ref_weight": ref_head.weight, "ref_bias": ref_head.bias}


class HiddenOutput(NamedTuple):
    """Last hidden states [B, L, H] with gradient, the head to apply, and the model's output.

    `output` holds the cache, among others; its logits are empty or meaningless.
    """

    hidden: Tensor
    head: LMHead
    output: Any


def forward_to_hidden(model: nn.Module, **inputs: Any) -> HiddenOutput:
    """Run a causal language model without its head.

    The scale and softcap of the logits are measured on the first call: the head returns a few known
    numbers, and the model's own code shows how it transforms them. No table of model families is
    needed.

    Args:
        model: a transformers model with a language-model head, wrapped or not.
        inputs: arguments of its forward: input_ids, attention_mask, position_ids, past_key_values,
            logits_to_keep, ...; no labels.

    Raises:
        ValueError: labels are given.
        TypeError: there is no head, or it is not linear, or has an adapter other than PEFT's LoRA
            (no variant such as DoRA, no dropout in training mode), modules_to_save and
            trainable_token_indices.
        NotImplementedError: the model does more to its logits than scale and softcap.
    """
    if inputs.get("labels") is not None:
        raise ValueError(
            f"labels must be left out, got {type(inputs['labels']).__name__}: pass the tokens to "
            "the methods of the head, or use score_labels"
        )
    return call_to_hidden(model, unwrap(model), inputs)


def call_to_hidden(call: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> HiddenOutput:
    """Run `call(**inputs)`, a forward of the unwrapped `model`, without the head of the model."""
    layer = head_layer(model)
    is_measured = layer in _SCALE_AND_SOFTCAP
    if not is_measured:
        linear_head(model)  # raises before the model runs
    hidden = []

    def remove_positions(_, arguments):
        hidden.append(arguments[0])
        empty, weight = arguments[0][..., :0, :], getattr(layer, "weight", None)
        if weight is not None and weight.is_floating_point():
            empty = empty.to(weight.dtype)  # an fp32 head of a bf16 model does not run by itself
        return (empty, *arguments[1:])

    def check_and_return_probe(_, arguments, keywords, output):
        if keywords:
            raise TypeError(
                f"the head of {type(model).__name__} must be called with hidden states alone, got "
                f"{', '.join(keywords)}: adapters that differ within a batch need the model's "
                "logits, and token_stats or grpo_loss"
            )
        if is_measured:
            return None
        dtype = torch.float32 if output.is_mps else torch.float64  # MPS has no fp64
        probe = torch.tensor(_PROBE, dtype=dtype, device=output.device)
        # Adding an empty sum keeps the graph connected: DistributedDataParallel searches it for
        # parameters without a gradient.
        return probe[None, :, None].expand(1, -1, output.shape[-1]) + output.sum()

    handles = [
        layer.register_forward_pre_hook(remove_positions),
        layer.register_forward_hook(check_and_return_probe, with_kwargs=True),
    ]
    # torch.compile checks whether a module has a forward of its own, but not whether it has hooks.
    forward, own_forward = layer.forward, vars(layer).get("forward")
    layer.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)
    try:
        output = call(**inputs)
    finally:
        delattr(layer, "forward") if own_forward is None else setattr(layer, "forward", own_forward)
        for handle in handles:
            handle.remove()
    # Read now: FSDP gathers, and PEFT may merge or unmerge, the weight when the model runs.
    head = linear_head(model)
    if not is_measured:
        logits = output[0] if isinstance(output, tuple) else output.logits
        _SCALE_AND_SOFTCAP[layer] = _measure_scale_and_softcap(
            logits, head.weight.shape[0], type(model).__name__
        )
    return HiddenOutput(hidden[0], LMHead(*head, *_SCALE_AND_SOFTCAP[layer]), output)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT, torch.compile or DistributedDataParallel."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DistributedDataParallel
            inner = inner.module
        else:
            return inner


# (scale, softcap) of the model that each head belongs to.
_SCALE_AND_SOFTCAP: weakref.WeakKeyDictionary[nn.Module, tuple[float, float | None]]
_SCALE_AND_SOFTCAP = weakref.WeakKeyDictionary()
# 0 shows an offset, 1 the scale, 1e30 the softcap, 40 the shape in between.
_PROBE = (0.0, 1.0, 40.0, 1e30)


def _measure_scale_and_softcap(
    logits: Tensor, V: int, model_name: str
) -> tuple[float, float | None]:
    """Compute (scale, softcap) from the transformed probe [1, 4, V]."""
    is_elementwise = logits.shape == (1, len(_PROBE), V) and bool((logits == logits[..., :1]).all())
    transformed = logits[0, :, 0].tolist() if is_elementwise else (math.nan,) * len(_PROBE)
    offset, at_one, at_forty, at_largest = transformed

    def is_close(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-2)  # the model may round its logits to bf16

    if is_close(at_largest, at_one * _PROBE[3]):
        scale, softcap, expected = at_one, None, at_one * _PROBE[2]
    else:
        softcap = at_largest
        scale = softcap * math.atanh(at_one / softcap) if 0 < at_one < softcap else math.nan
        scale = round(scale, 12 if logits.dtype == torch.float64 else 6)
        expected = softcap * math.tanh(scale * _PROBE[2] / softcap)
    if offset != 0 or not scale > 0 or not is_close(at_forty, expected):
        raise NotImplementedError(
            f"{model_name} does more to its logits than a scale and a softcap: take its logits, "
            "and token_stats or grpo_loss"
        )
    return scale, softcap
