"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Small matrices beside the frozen weights train in their stead. A wrapped model is called as before;
with its adapter off it is the base model, so the reference policy of a KL needs no second copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reference.training.errors import import_package


def add_lora(model: Any, rank: int, alpha: float):
    """Replace each W but the LM head's by W + alpha/rank · B·A; only A and B train, in fp32.

    A has `rank` rows. B starts as 0, so the outputs are at first those of the model. There is no
    dropout: it would make sampler and trainer two different policies.
    """
    peft = load_peft()
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks for a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, settings)


def load_peft() -> ModuleType:
    """Import peft; called before a model is loaded, it fails early."""
    message = '--lora-rank needs the package peft: pip install -e ".[train]"'
    return import_package("peft", message)


def has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def merged(model: Any):
    """Return a copy on the CPU with the adapter merged into its weights.

    AutoModelForCausalLM can load it. A model without an adapter is returned itself.
    """
    if not has_adapter(model):
        return model
    return _copy(model, lambda weight: weight.to("cpu", copy=True)).merge_and_unload()


def frozen_copy(model: nn.Module, dtype: torch.dtype | None):
    """Copy a model without gradients, with the weights of linear layers in `dtype`, if given.

    Weights tied to an embedding keep their dtype, and so do buffers: rotary embeddings need fp32.
    At no time are there two copies, one of each dtype.
    """

    def weights(kind: type[nn.Linear] | type[nn.Embedding]) -> set[Tensor]:
        return {module.weight for module in model.modules() if isinstance(module, kind)}

    cast = weights(nn.Linear) - weights(nn.Embedding) if dtype else set()
    return _copy(model, lambda weight: weight.to(dtype) if weight in cast else weight.clone())


def _copy(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Deep-copy a model with frozen parameters `change(parameter)`; tied ones stay tied."""
    memo = {}
    for parameter in model.parameters():
        with torch.no_grad():
            memo[id(parameter)] = nn.Parameter(change(parameter), requires_grad=False)
    return copy.deepcopy(model, memo)
