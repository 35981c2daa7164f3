"""Make a Hugging Face causal language model return log-probs and entropies of labels.

    with score_labels(model):
        output = model(input_ids, attention_mask=attention, labels=labels, temperature=0.7)
    output.logprobs, output.entropy  # [B, L - 1], of labels[:, 1:]

The model's own forward runs, with every wrapper around it, but without its head: no logits are
computed. A loop that reads log-probs from `model(...)` needs no other change.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .linear_head import linear_head
from .transformers import call_to_hidden, unwrap

IGNORE_INDEX = -100  # Hugging Face's label of a token that is not scored

_OF_MODELS = {field.name for field in fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _OF_MODELS else "past_key_values"


@dataclass
class ScoredOutput(ModelOutput):
    """Log-probs and entropies of labels; as a tuple or a tree it has no fields that are None.

    Attributes:
        logprobs, entropy: [B, L - 1] for `labels`, [B, L] for `shift_labels`, in nats, fp32 (fp64
            for an fp64 model), 0 where the label is -100; differentiable in the model's parameters.
        logits: None.
        cache (past_key_values before transformers 5.24), hidden_states, attentions, router_logits,
            aux_loss: the model's own.
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    logits: None = None
    if _CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


# The number of handles of each patched model.
_HANDLES: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
# Attribute of our forward that holds the forward it replaced on the model itself, or None.
_REPLACED = "_grpo_kernels_replaced_forward"


class ScoringHandle:
    """Undo `score_labels`, by `remove()` or at the end of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        _HANDLES[model] = _HANDLES.get(model, 0) + 1

    def remove(self) -> None:
        """Undo this call of `score_labels`; the last handle of a model removes the patch."""
        model, self._model = self._model, None
        if model is None:
            return
        _HANDLES[model] -= 1
        if _HANDLES[model]:
            return
        del _HANDLES[model]
        method = vars(model).get("forward")
        if not hasattr(method, _REPLACED):
            return  # another forward wraps ours, which from now on only calls the original
        replaced = getattr(method, _REPLACED)
        if replaced is None:
            del model.forward
        else:
            model.forward = replaced

    def __enter__(self) -> "ScoringHandle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def score_labels(model: nn.Module) -> ScoringHandle:
    """Make `model(..., labels=...)` return log-probs and entropies instead of logits and loss.

    Until the handle is removed the model's forward takes, besides its own arguments,

        labels: [B, L], as in Hugging Face the tokens themselves: labels[:, t] is predicted at
            t - 1. The result is [B, L - 1], for labels[:, 1:]. Every label but -100 is scored,
            padding too; the result for -100 is 0.
        shift_labels: [B, L], instead of labels: shift_labels[:, t] is predicted at t. The result
            is [B, L].
        temperature: > 0; a number, or a tensor that broadcasts to the result.

    With logits_to_keep = K the last K positions are scored: K - 1 labels, or K shift_labels.
    logits_to_keep as indices needs shift_labels. A bias, a scale, a softcap and every row of the
    head, also rows that pad the vocabulary, count as in the model's own forward. Without labels the
    model's output is unchanged, so it can generate. No loss is computed.

    Args:
        model: a transformers model with a language-model head, or wrapped in PEFT,
            DistributedDataParallel, FSDP2 or torch.compile, before or after this call. A copy of
            the model is not patched.

    Returns:
        A handle: `handle.remove()` undoes the patch, as does leaving `with score_labels(model):`.

    Raises:
        TypeError: at once, if the head is not linear, or has an adapter that `forward_to_hidden`
            does not support. At a call of the model: errors of `forward_to_hidden`, and ValueError
            as `linear_token_stats`.
    """
    model = unwrap(model)
    linear_head(model)
    if model not in _HANDLES:
        replaced = vars(model).get("forward")  # accelerate puts a forward on the model itself

        def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            # Bound to self, so that a copy of the model runs on its own parameters.
            original = type(self).forward.__get__(self) if replaced is None else replaced
            if self not in _HANDLES:
                return original(*arguments, **keywords)
            return _score_or_forward(self, original, arguments, keywords)

        functools.update_wrapper(forward, type(model).forward)
        setattr(forward, _REPLACED, replaced)
        # On the model itself, so that hooks and wrappers run around it.
        model.forward = types.MethodType(forward, model)
    return ScoringHandle(model)


def _score_or_forward(
    model: nn.Module, original: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]
) -> Any:
    """Score the labels if there are any; else call the original forward."""
    signature = inspect.signature(type(model).forward)
    inputs = dict(signature.bind_partial(model, *arguments).arguments) | keywords
    inputs.pop(next(iter(signature.parameters)))  # self
    labels, shift_labels = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is None and shift_labels is None:
        return original(*arguments, **keywords)
    if labels is not None and shift_labels is not None:
        raise ValueError("labels or shift_labels must be given, got both")
    temperature, return_dict = inputs.pop("temperature", 1.0), inputs.pop("return_dict", True)
    hidden, head, output = call_to_hidden(original, model, inputs)

    # Select the positions that predict a label, as logits_to_keep says.
    kept = inputs.get("logits_to_keep", 0)
    if labels is None:
        assert shift_labels is not None
        targets = shift_labels[:, kept if isinstance(kept, Tensor) else slice(-kept, None)]
    elif isinstance(kept, Tensor):
        raise ValueError("logits_to_keep as indices needs shift_labels, got labels")
    else:
        hidden, targets = hidden[:, :-1], labels[:, slice(-kept, None)][:, 1:]

    device = head.weight.device  # the model may be spread over several
    targets = targets.to(device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(device)
    stats = head.token_stats(
        hidden.to(device), targets, temperature=temperature, mask=targets != IGNORE_INDEX
    )
    assert stats.entropy is not None
    scored = {field.name: getattr(output, field.name, None) for field in fields(ScoredOutput)}
    # Clones, because FSDP2's hook on a view would not survive an in-place operation of the caller.
    scored |= {"logprobs": stats.logprob.clone(), "entropy": stats.entropy.clone(), "logits": None}
    scored_output = ScoredOutput(**scored)
    return scored_output.to_tuple() if return_dict is False else scored_output
