"""One wrong argument in a call that is otherwise right: what each may be made of."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.fuzz_cases import Call

ONE_PER_TOKEN = ("old_logprob", "ref_logprob", "sampling_logprob", "entropy", "kl", "advantages")
FLOATING = (
    "logits", "new_logits", "ref_logits", "hidden", "weight", "bias", "logprob", "old_logprob",
    "ref_logprob", "sampling_logprob",
)  # fmt: skip
NUMBERS = ("softcap", "eps", "normalizer", "entropy_normalizer")
NO_TENSOR = ([0.5], "x", 3)
NO_NUMBER = ("x", [1.0], True)
NO_POSITIVE = (0, -1.0, float("nan"), float("inf"))


def wrong_arguments(call: Call) -> st.SearchStrategy[tuple[str, object]]:
    """(name, wrong value) for an argument that the call has."""
    wrong = [(name, value) for name in call.arguments for value in _wrong(call, name)]
    return st.sampled_from(wrong)


def _wrong(call: Call, name: str) -> list[object]:
    value = call.arguments[name]
    if name == "config":
        return ["grpo", None, {}]
    if name in ("reduction",) or (name == "kl" and not isinstance(value, Tensor)):
        return ["medium", 3, []]
    if name == "chunk_tokens":
        return [0, -1, 1.5, "x", True]
    if name in ("k", "length"):
        return [-1, 1.5, "x", True]
    if name in NUMBERS:
        if call.name in ("kl_divergence", "cross_entropy_from_logits"):
            return []  # eps has no effect there
        return [*NO_NUMBER, *NO_POSITIVE]
    if name == "weights":
        return [3, "x", [1.0] * 7, ["x"] * len(call.arguments["rewards"])]
    if name == "temperature":
        found = [*NO_NUMBER, *NO_POSITIVE]
        return [*found, torch.zeros(()), torch.ones(7, 7, 7)] if _counts(call) else found
    if not isinstance(value, Tensor):
        return [*NO_TENSOR] if name == "mask" else []
    return _wrong_tensors(call, name, value)


def _wrong_tensors(call: Call, name: str, value: Tensor) -> list[object]:
    unread = ("ref_logits", "ref_hidden", "ref_weight", "ref_bias")
    if name in unread and call.arguments.get("ref_logprob") is not None:
        return []
    found: list[object] = [*NO_TENSOR, None] if name not in OPTIONAL else [*NO_TENSOR]
    if call.name != "entropy_from_logits" or name == "mask":  # whose shape is free
        found += [value.new_zeros((*value.shape, 1, 1, 1))]
    if name in FLOATING:
        found += [value.nan_to_num(0).to(torch.int64), value.to(torch.complex64)]
    if name == "tokens":
        found += [value.double(), value.to(torch.bool)]
        found += [torch.full_like(value, -1)] if _counts(call) else []
    if name == "mask" and value.numel():
        found += [torch.full(value.shape, 0.5), torch.full(value.shape, torch.nan)]
    if name == "cu_seqlens":
        found += [value.double(), value + 1, -value if value[-1] else value[None]]
    return found


def _counts(call: Call) -> bool:
    """Whether some token is looked at."""
    some = torch.Size(call.shape).numel() > 0
    return some and (call.mask is None or bool((call.mask != 0).any()))


OPTIONAL = (
    "mask", "bias", "ref_bias", "old_logprob", "ref_logprob", "sampling_logprob", "entropy", "kl",
    "cu_seqlens", "ref_logits", "ref_hidden", "ref_weight",
)  # fmt: skip
