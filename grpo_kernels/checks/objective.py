"""Checks of the objective's settings and of its per-token arguments."""

from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..validation import expect_number, expect_tensor, shape_of, values_are_readable

if TYPE_CHECKING:
    from ..objective.config import LossConfig


def check_max_completion_length(value: object, aggregation: str) -> None:
    if aggregation != "fixed_length":
        if value is not None:
            raise ValueError(
                "max_completion_length is read by aggregation='fixed_length' only, "
                f"got {value!r} with aggregation={aggregation!r}"
            )
        return
    if value is None:
        raise ValueError("aggregation='fixed_length' needs max_completion_length, got None")
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"max_completion_length must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"max_completion_length must be at least 1, got {value}")


def check_logprob(logprob: Tensor) -> None:
    expect_tensor("logprob", logprob, floating=True)
    if logprob.dim() not in (1, 2):
        raise ValueError(f"logprob must be [B, T] or packed [N], got {shape_of(logprob)}")


def check_advantages(advantages: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> None:
    expect_tensor("advantages", advantages)
    allowed = [shape]
    if len(shape) == 2:
        allowed.append(shape[:1])
    elif cu_seqlens is not None:
        allowed.append(torch.Size([cu_seqlens.shape[0] - 1]))
    if advantages.shape not in allowed:
        expected = " or ".join(str(tuple(each)) for each in allowed)
        raise ValueError(f"advantages must have shape {expected}, got {shape_of(advantages)}")


def check_cu_seqlens(cu_seqlens: Tensor | None, shape: torch.Size, config: "LossConfig") -> None:
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens belongs to packed [N] input, got [B, T] input")
        return
    if cu_seqlens is None:
        if config.reads_sequences:
            settings = (
                "surrogate", "ratio_level", "aggregation", "importance_level",
                "off_policy_threshold",
            )  # fmt: skip
            given = ", ".join(f"{name}={getattr(config, name)!r}" for name in settings)
            raise ValueError(f"packed [N] input needs cu_seqlens with {given}, got None")
        return
    expect_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [sequences + 1], got {shape_of(cu_seqlens)}")
    if not values_are_readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != shape[0] or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to {shape[0]} tokens, got {cu_seqlens.tolist()}"
        )


def check_normalizers(
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    entropy_coef: float,
    aggregation: str,
) -> None:
    for name, value in (
        ("normalizer", normalizer),
        ("entropy_normalizer", entropy_normalizer),
    ):
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(
                    f"{name} must be a number or a 0-dim tensor, got {shape_of(value)}"
                )
        elif value is not None and not torch.compiler.is_compiling():
            # Under torch.compile the number is a symbol, and a comparison would recompile for it.
            expect_number(name, value, above=0)
    if entropy_coef == 0 or normalizer is None or aggregation == "token_mean":
        return
    if entropy_normalizer is None:
        raise ValueError(
            f"normalizer with entropy_coef={entropy_coef} and aggregation={aggregation!r} needs "
            "entropy_normalizer, the number of tokens that the mean entropy divides by, got None"
        )


def check_kl_input(
    kl_estimator: str,
    beta: float,
    over_vocabulary: bool,
    ref_logprob: Tensor | None,
    kl: Tensor | None,
) -> None:
    wanted, given = ("kl", kl) if over_vocabulary else ("ref_logprob", ref_logprob)
    unread, stray = ("ref_logprob", ref_logprob) if over_vocabulary else ("kl", kl)
    if beta != 0 and given is None:
        raise ValueError(f"beta={beta} with kl_estimator={kl_estimator!r} needs {wanted}, got None")
    if stray is not None:
        raise ValueError(f"kl_estimator={kl_estimator!r} reads {wanted}, got {unread}")


def check_entropy_input(config: "LossConfig", entropy: Tensor | None) -> None:
    for name in ("entropy_coef", "top_entropy"):
        if getattr(config, name) and entropy is None:
            raise ValueError(f"{name}={getattr(config, name)} needs entropy, got None")


def check_sampling_input(importance_mode: str, sampling_logprob: Tensor | None) -> None:
    if importance_mode == "mask" and sampling_logprob is None:
        raise ValueError("importance_mode='mask' needs sampling_logprob, got None")


def check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {type(value).__name__}")


def check_per_token(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    """A floating-point tensor with one value per token, or None."""
    if tensor is not None:
        expect_tensor(name, tensor, floating=True, shape=shape)
