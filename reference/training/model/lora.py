"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Small matrices beside the frozen weights train in their stead. A wrapped model is called as before;
with its adapter off it is the base model, so the reference policy of a KL needs no second copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reference.training.errors import UserError


def add_lora(model: Any, rank: int, alpha: float, targets: str | Sequence[str] = "all-linear"):
    """The model with W + alpha/rank · B·A in the place of W; only A and B train, in fp32.

    B is 0 at first, so that the numbers are still the model's. There is no dropout, which would
    make sampler and trainer two different policies.

    Args:
        model: a transformers model.
        rank: rows of A, at least 1.
        alpha: the scale, above 0.
        targets: "all-linear" is every linear layer but the head; or the names of layers.

    Raises:
        UserError: peft is not installed.
    """
    peft = load_peft()
    if not isinstance(targets, str):
        targets = list(targets)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks for a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, settings)


def load_peft() -> ModuleType:
    """The package, or a UserError: called before a model is loaded, it fails early."""
    try:
        import peft
    except ImportError:
        raise UserError(
            '--lora-rank needs the package peft: pip install "grpo_kernels[train]"'
        ) from None
    return peft


def has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def without_adapter(model: Any) -> AbstractContextManager:
    """While this lasts the model is the one before `add_lora`; a plain model is itself."""
    return model.disable_adapter() if has_adapter(model) else nullcontext()


def merged(model: Any):
    """A plain model, in memory of the CPU, with the adapter added into its weights; it loads with
    AutoModelForCausalLM. The model given is left as it is, and returned where it has no adapter."""
    if not has_adapter(model):
        return model
    return _copy(model, lambda each: each.to("cpu", copy=True)).merge_and_unload()


def frozen_copy(model: nn.Module, dtype: torch.dtype | None):
    """A copy that does not train, with the weights of linear layers in `dtype`, if it is given.

    Weights that an embedding shares keep theirs, and so do buffers: those of rotary embeddings need
    fp32. At no time are there two copies, one of each dtype.
    """
    changed = _weights_of(model, nn.Linear) - _weights_of(model, nn.Embedding)
    return _copy(model, lambda each: each.to(dtype) if dtype and each in changed else each.clone())


def _weights_of(model: nn.Module, kind: type[nn.Module]) -> set[nn.Parameter]:
    return {each.weight for each in model.modules() if isinstance(each, kind)}


def _copy(model: nn.Module, change: Callable[[Tensor], Tensor]):
    """A deep copy, but for its parameters: frozen, and `change` of the model's; ties stay tied."""
    memo = {}
    for parameter in model.parameters():
        with torch.no_grad():
            memo[id(parameter)] = nn.Parameter(change(parameter), requires_grad=False)
    return copy.deepcopy(model, memo)
