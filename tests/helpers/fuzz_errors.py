"""Wrong values for one argument of an otherwise correct call."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from grpo_kernels import TokenSupport
from tests.helpers.fuzz_cases import Call

FLOATING = (
    "logits", "new_logits", "ref_logits", "hidden", "weight", "bias", "logprob", "old_logprob",
    "ref_logprob", "sampling_logprob",
)  # fmt: skip
OPTIONAL = (
    "mask", "bias", "ref_bias", "old_logprob", "ref_logprob", "sampling_logprob", "entropy", "kl",
    "cu_seqlens", "ref_logits", "ref_hidden", "ref_weight", "nll_weight",
)  # fmt: skip
NUMBERS = ("softcap", "eps", "normalizer", "entropy_normalizer", "nll_normalizer")
NOT_TENSORS = ([0.5], "x", 3)
NOT_NUMBERS = ("x", [1.0], True)
NOT_POSITIVE = (0, -1.0, float("nan"), float("inf"))


def wrong_arguments(call: Call) -> st.SearchStrategy[tuple[str, object]]:
    """Draw (name, wrong value) for an argument of the call."""
    wrong = [(name, value) for name in call.arguments for value in _wrong_values(call, name)]
    return st.sampled_from(wrong)


def _wrong_values(call: Call, name: str) -> list[object]:
    value = call.arguments[name]
    if name == "config":
        return ["grpo", None, {}]
    if name == "reduction" or (name == "kl" and not isinstance(value, Tensor)):
        return ["medium", 3, []]
    if name == "chunk_tokens":
        return [0, -1, 1.5, "x", True]
    if name in ("k", "length"):
        return [-1, 1.5, "x", True]
    if name in NUMBERS:
        if call.name in ("kl_divergence", "cross_entropy_from_logits"):
            return []  # eps has no effect there
        return [*NOT_NUMBERS, *NOT_POSITIVE]
    if name == "weights":
        return [3, "x", [1.0] * 7, ["x"] * len(call.arguments["rewards"])]
    if name == "temperature":
        wrong = [*NOT_NUMBERS, *NOT_POSITIVE]
        return [*wrong, torch.zeros(()), torch.ones(7, 7, 7)] if _has_tokens(call) else wrong
    if isinstance(value, TokenSupport):
        ids, offsets = value
        wrong = [*NOT_TENSORS, tuple(value), TokenSupport(ids.double(), offsets)]
        wrong += [TokenSupport(ids[None], offsets), TokenSupport(ids, offsets + 1)]
        wrong += [TokenSupport(ids, offsets[:-1])]
        lacking = TokenSupport.from_lists([[-1]] * (len(offsets) - 1))
        return [*wrong, lacking] if _has_tokens(call) else wrong
    if not isinstance(value, Tensor):
        return [*NOT_TENSORS] if name == "mask" else []
    return _wrong_tensors(call, name, value)


def _wrong_tensors(call: Call, name: str, value: Tensor) -> list[object]:
    unread = ("ref_logits", "ref_hidden", "ref_weight", "ref_bias")
    if name in unread and call.arguments.get("ref_logprob") is not None:
        return []
    wrong: list[object] = [*NOT_TENSORS] if name in OPTIONAL else [*NOT_TENSORS, None]
    if call.name != "entropy_from_logits" or name == "mask":  # its logits have any shape
        wrong += [value.new_zeros((*value.shape, 1, 1, 1))]
    if name in FLOATING:
        wrong += [value.nan_to_num(0).to(torch.int64), value.to(torch.complex64)]
    if name == "tokens":
        wrong += [value.double(), value.to(torch.bool)]
        wrong += [torch.full_like(value, -1)] if _has_tokens(call) else []
    if name == "mask" and value.numel():
        wrong += [torch.full(value.shape, 0.5), torch.full(value.shape, torch.nan)]
    if name == "cu_seqlens":
        wrong += [value.double(), value + 1, -value if value[-1] else value[None]]
    return wrong


def _has_tokens(call: Call) -> bool:
    """Tell whether the call has an unmasked token."""
    some = torch.Size(call.shape).numel() > 0
    return some and (call.mask is None or bool((call.mask != 0).any()))
