"""Read the LM head of a model as weight, bias and low-rank adapter, through the layers of PEFT.

* A plain nn.Linear has a weight and a bias.
* LoRA adds an adapter for each active adapter of PEFT. A merged one is in the weight already.
* modules_to_save has a copy of the layer, and trainable_token_indices new rows of the weight.

Adapters count as in the head's own forward at this moment, disabled ones too. PEFT is imported only
when one of its layers is found.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lm_head.inputs import HeadAdapter

_INSTEAD = "take the model's logits, and token_stats or grpo_loss"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LinearHead(NamedTuple):
    """logits = hidden @ weight.T + bias + adapter.scale · (hidden @ a.T) @ b.T; see HeadAdapter."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    adapter: HeadAdapter | None


def head_layer(model: Any) -> nn.Module:
    """Return the layer of a transformers model that turns hidden states into logits."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise TypeError(
            "model must be a transformers model with an LM head, as AutoModelForCausalLM loads it, "
            f"got {type(model).__name__}"
        )
    return layer


def linear_head(model: Any) -> LinearHead:
    """Return what the head of a transformers model multiplies hidden states by, as it is now.

    Raises:
        TypeError: there is no head, or it is not linear, or has an adapter that no LinearHead
            describes: any but LoRA without variants and without dropout.
    """
    return _read(head_layer(model))


def _read(layer: Any) -> LinearHead:
    if any(base.__module__.startswith("peft.") for base in type(layer).__mro__):
        return _read_peft(layer)
    is_linear = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    weight = layer.weight if is_linear else None
    is_packed = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "to_local")
    if weight is None or weight.dtype not in _DTYPES or is_packed:
        of_weight = "" if weight is None else f" with {_name_of(weight)} in {weight.dtype}"
        raise TypeError(
            "the LM head must be a torch.nn.Linear with a weight in fp16, bf16, fp32 or fp64, got "
            f"{_name_of(layer)}{of_weight}: leave it out of quantization, or {_INSTEAD}"
        )
    return LinearHead(weight, layer.bias, None)


def _read_peft(layer: Any) -> LinearHead:
    from peft.tuners import lora
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        copies, names = layer.modules_to_save, layer.active_adapters
        is_original = (
            layer.disable_adapters or not names or any(name not in copies for name in names)
        )
        return _read(layer.original_module if is_original else copies[names[0]])
    if isinstance(layer, TrainableTokensWrapper):
        return _read(layer.token_adapter)
    if isinstance(layer, TrainableTokensLayer):
        base, names = _read(layer.base_layer), layer.active_adapters
        if layer.disable_adapters or layer.merged or not names:
            return base
        return LinearHead(layer.get_merged_weights(names), None, None)  # PEFT adds no bias here
    if isinstance(layer, lora.Linear) and type(layer).forward is lora.Linear.forward:
        return _read_lora(layer)
    raise TypeError(
        "the LM head may have PEFT's LoRA, modules_to_save or trainable_token_indices, got "
        f"{_name_of(layer)}: leave the head out of target_modules, or {_INSTEAD}"
    )


def _read_lora(layer: Any) -> LinearHead:
    """Read a LoRA: B A x, scaled, of each active adapter; merged ones are in the weight."""
    base = _read(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return base
    bias, adapters = base.bias, [] if base.adapter is None else [base.adapter]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        dropout, variant = layer.lora_dropout[name], layer.lora_variant.get(name)
        if variant is not None:
            raise TypeError(
                f"the LM head may have a plain LoRA, got the adapter {name!r} with "
                f"{_name_of(variant)}: leave the head out of its target_modules, or {_INSTEAD}"
            )
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            raise TypeError(
                f"the LM head may have a LoRA without dropout, got the adapter {name!r} with "
                f"lora_dropout={dropout.p} in training mode: set lora_dropout=0, leave the head "
                "out of target_modules, or call model.eval()"
            )
        a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        adapters.append(HeadAdapter(a.weight, b.weight, scale))
        if b.bias is not None:
            own_bias = scale * b.bias
            bias = (own_bias if bias is None else bias + own_bias).to(base.weight.dtype)
    return LinearHead(base.weight, bias, _as_one(adapters))


def _as_one(adapters: list[HeadAdapter]) -> HeadAdapter | None:
    """Concatenate adapters along r; one alone is returned without a copy."""
    if len(adapters) <= 1:
        return adapters[0] if adapters else None
    a = torch.cat([adapter.scale * adapter.a for adapter in adapters])
    return HeadAdapter(a, torch.cat([adapter.b for adapter in adapters], dim=1), 1.0)


def _name_of(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
