"""A Hugging Face causal language model that answers labels with per-token log-probs and entropies.

    with score_labels(model):
        output = model(input_ids, attention_mask=attention, labels=labels, temperature=0.7)
    output.logprobs, output.entropy  # [B, L - 1], of labels[:, 1:]

The model's own forward runs, in all its wrappers, but for its head: no logits are made. A loop that
reads log-probs from `model(...)` needs no other change.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from .transformers import Forward, forward_by, linear_head

IGNORED = -100  # Hugging Face's label of a token that is not scored


@dataclass
class ScoredOutput(ModelOutput):
    """What a model says of labels; fields that are None are in no tuple and no tree.

    Attributes:
        logprobs, entropy: [B, L - 1] of `labels`, [B, L] of `shift_labels`, in nats, fp32 (fp64 of
            an fp64 model), 0 where the label is -100; differentiable in the model's parameters.
        logits: None.
        past_key_values, hidden_states, attentions, router_logits, aux_loss: the model's own.
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    logits: None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class ScoringHandle:
    """Undoes `score_labels`, by `remove()` or at the end of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model

    def remove(self) -> None:
        """The model answers as before; the last of several handles takes the patch away."""
        if self._model is not None:
            _release(self._model)
            self._model = None

    def __enter__(self) -> "ScoringHandle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def score_labels(model: nn.Module) -> ScoringHandle:
    """Make `model(..., labels=...)` return log-probs and entropies in the place of logits and loss.

    Until the handle is removed the model's forward takes, beside its own arguments,

        labels: [B, L], as in Hugging Face the tokens themselves: labels[:, t] is predicted at
            t - 1. The result is [B, L - 1], of labels[:, 1:]. -100 is not scored, and 0 in the
            result; whatever else is scored, padding too.
        shift_labels: [B, L], in their place: shift_labels[:, t] is predicted at t. The result is
            [B, L].
        temperature: > 0; a number, or a tensor that broadcasts to the result.

    With logits_to_keep = K, the last K positions are scored: K - 1 labels, or K shift_labels; as
    indices it goes with shift_labels only. What the model does to its logits, a bias, a scale or a
    softcap, and every row of its head, padding of the vocabulary too, count as in its own forward.
    Without labels the model answers as ever, so it generates. There is no loss: it is the caller's.

    Args:
        model: a transformers model with a language-model head, or in PEFT, DistributedDataParallel,
            FSDP2 or torch.compile, before or after they wrap it. A copy of it is not patched.

    Returns:
        A handle: `handle.remove()` undoes it, and so does the end of `with score_labels(model):`.

    Raises:
        TypeError: at once, where the head is no plain linear layer. At a call: NotImplementedError
            as `causal_lm.forward`, ValueError as `linear_token_stats`.
    """
    model = _innermost(model)
    linear_head(model)
    if model not in _HANDLES:
        _install(model)
    _HANDLES[model] = _HANDLES.get(model, 0) + 1
    return ScoringHandle(model)


# How many handles each patched model has; and the method that was put on it.
_HANDLES: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_METHOD = "_grpo_kernels_scores_labels"


def _innermost(model: nn.Module) -> nn.Module:
    """The transformers model: every wrapper ends in a call of its forward."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # of PEFT
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # of torch.compile
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # of DistributedDataParallel
        else:
            return model


def _install(model: nn.Module) -> None:
    """Put a forward on the model itself, where hooks and wrappers of it run around ours."""
    before = vars(model).get("forward")  # accelerate's, for one

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        # Bound to self, so that a copy of the model runs on its own parameters.
        original = type(self).forward.__get__(self) if before is None else before
        if self not in _HANDLES:
            return original(*arguments, **keywords)
        return _answer(self, original, arguments, keywords)

    functools.update_wrapper(forward, type(model).forward)
    setattr(forward, _METHOD, before)
    model.forward = types.MethodType(forward, model)


def _release(model: nn.Module) -> None:
    _HANDLES[model] -= 1
    if _HANDLES[model]:
        return
    del _HANDLES[model]
    method = vars(model).get("forward")
    if not hasattr(method, _METHOD):
        return  # someone's forward is around ours, which from now on only passes on
    before = getattr(method, _METHOD)
    if before is None:
        del model.forward
    else:
        model.forward = before


def _answer(
    model: nn.Module, original: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]
) -> Any:
    """What the patched forward returns: of labels their scores, else what the original does."""
    signature = inspect.signature(type(model).forward)
    inputs = dict(signature.bind_partial(model, *arguments).arguments) | keywords
    inputs.pop(next(iter(signature.parameters)))  # self
    labels, shift_labels = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is None and shift_labels is None:
        return original(*arguments, **keywords)
    if labels is not None and shift_labels is not None:
        raise ValueError("labels or shift_labels must be given, got both")
    temperature, as_output = inputs.pop("temperature", 1.0), inputs.pop("return_dict", True)
    found = forward_by(original, model, inputs)
    kept = inputs.get("logits_to_keep", 0)
    if labels is None:
        positions, targets = slice(None), shift_labels
        targets = targets[:, kept if isinstance(kept, Tensor) else slice(-kept, None)]
    elif isinstance(kept, Tensor):
        raise ValueError("logits_to_keep as indices needs shift_labels, got labels")
    else:
        positions, targets = slice(None, -1), labels[:, slice(-kept, None)][:, 1:]
    output = _scored(found, positions, targets, temperature)
    return output.to_tuple() if as_output is False else output


def _scored(
    found: Forward, positions: slice, targets: Tensor, temperature: float | Tensor
) -> ScoredOutput:
    device = found.head.weight.device  # a model may be spread over several
    targets = targets.to(device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(device)
    stats = found.head.token_stats(
        found.hidden.to(device)[:, positions],
        targets,
        temperature=temperature,
        mask=targets != IGNORED,
    )
    own = {each.name: getattr(found.output, each.name, None) for each in fields(ScoredOutput)}
    # Clones, because FSDP2's hook would not survive what a caller does in place to a view.
    scores = {"logprobs": stats.logprob.clone(), "entropy": stats.entropy.clone(), "logits": None}
    return ScoredOutput(**own | scores)
