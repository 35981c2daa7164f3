"""The weights of a policy as an inference engine loads them: names and shapes of a checkpoint.

`model.state_dict()` will not do. It names the layers of LoRA apart from the weights that they
adapt, Transformers stacks what a checkpoint has one by one (the experts of a mixture), and under
FSDP it returns shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reference.training.model import lora


@torch.no_grad()
def synced_weights(policy) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of `policy.model` by its name in a checkpoint, detached.

    A head that is tied to the embedding has its own name as well. The product of a LoRA adapter is
    added to the weight in a copy, made when its turn comes: consume them one by one and only one
    copy exists at a time. In `model.disable_adapter()` the weights are those of the base model.
    Under FSDP the weights must be whole: call this in `ranks.unsharded`.
    """
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    model = policy.model
    if lora.has_adapter(model):
        model = model.get_base_model()
    conversions = getattr(model, "_weight_conversions", None) or []
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        # Stacks are taken apart, or parts put together, which needs all weights at once.
        yield from revert_weight_conversion(model, dict(_merged_weights(model))).items()
        return
    for name, weight in _merged_weights(model):
        yield from revert_weight_conversion(model, {name: weight}).items()


def _merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and saved buffers, tied ones under each name, with adapters merged."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        if "lora_" in prefix:
            continue
        is_adapted = prefix.endswith(".base_layer")
        path = prefix.removesuffix(".base_layer")
        unsaved = module._non_persistent_buffers_set
        buffers = dict(module.named_buffers(recurse=False))
        saved = {name: x for name, x in buffers.items() if name not in unsaved}
        for name, weight in (dict(module.named_parameters(recurse=False)) | saved).items():
            weight = weight.detach()
            if is_adapted and name == "weight" and not modules[path].disable_adapters:
                for adapter in modules[path].active_adapters:
                    weight = weight + modules[path].get_delta_weight(adapter)
            yield f"{path}.{name}".lstrip("."), weight
