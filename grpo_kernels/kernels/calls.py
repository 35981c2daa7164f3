"""Host side of the kernels: outputs, strides and grids, behind the same functions as eager/."""

import os
from contextlib import nullcontext

import torch
import triton.language as tl
from torch import Tensor

from ..launch import pick_row_launch
from .approximate_kl import _approximate_kl_backward_kernel, _approximate_kl_forward_kernel
from .token_stats import _token_stats_backward_kernel, _token_stats_forward_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_KERNELS = {
    "token_stats_forward": _token_stats_forward_kernel,
    "token_stats_backward": _token_stats_backward_kernel,
    "approximate_kl_forward": _approximate_kl_forward_kernel,
    "approximate_kl_backward": _approximate_kl_backward_kernel,
}


def _launch(name: str, logits: Tensor, acc: torch.dtype, *arguments, **constants) -> None:
    """One program per row of logits [B, T, V], none if there are none."""
    B, T, V = logits.shape
    if B * T == 0:
        return
    pick = pick_row_launch(name, V, logits.element_size(), interpreted=INTERPRETED)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _KERNELS[name][(B * T,)](
            *arguments,
            **constants,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            UNROLL=pick.unroll,
            LANES=pick.lanes,
            VEC=pick.vector,
            num_warps=pick.num_warps,
        )


def _row_strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def token_stats_forward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    softcap: float | None,
    entropy: bool,
    kl: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(logprob, entropy, kl, normaliser, ref_normaliser) of every row of logits [B, T, V].

    temperature is [B, T] in the accumulation dtype; a normaliser [B, T, 2] is (pivot, log_sum).
    """
    logprob = temperature.new_empty(tokens.shape)
    normaliser = temperature.new_empty((*tokens.shape, 2))
    entropy_value = torch.empty_like(logprob) if entropy else None
    kl_value = torch.empty_like(logprob) if kl else None
    ref_normaliser = torch.empty_like(normaliser) if kl else None
    _launch(
        "token_stats_forward",
        logits,
        temperature.dtype,
        logits,
        ref_logits,
        tokens,
        temperature,
        mask,
        logprob,
        entropy_value,
        kl_value,
        normaliser,
        ref_normaliser,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(ref_logits),
        temperature.stride(-1),
        KL=kl or "none",
        SOFTCAP=softcap,
    )
    return logprob, entropy_value, kl_value, normaliser, ref_normaliser


def token_stats_backward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    normaliser: Tensor,
    ref_normaliser: Tensor | None,
    entropy_value: Tensor | None,
    kl_value: Tensor | None,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    softcap: float | None,
    kl: str | None,
    d_logits: Tensor,
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be logits itself."""
    _launch(
        "token_stats_backward",
        logits,
        temperature.dtype,
        logits,
        ref_logits,
        tokens,
        temperature,
        mask,
        normaliser,
        ref_normaliser,
        entropy_value,
        kl_value,
        d_logprob,
        d_entropy,
        d_kl,
        d_logits,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(ref_logits),
        *_row_strides(d_logits),
        temperature.stride(-1),
        KL=kl or "none",
        SOFTCAP=softcap,
    )


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, W, normaliser, ref_normaliser) of every row of [B, T, V]; mask [B, T]."""
    total = logits.new_empty(mask.shape, dtype=dtype)
    weight = torch.empty_like(total)
    normaliser = logits.new_empty((*mask.shape, 2), dtype=dtype)
    ref_normaliser = torch.empty_like(normaliser)
    _launch(
        "approximate_kl_forward",
        logits,
        dtype,
        logits,
        ref_logits,
        mask,
        total,
        weight,
        normaliser,
        ref_normaliser,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(ref_logits),
        LOG2_EPS=log2_eps,
    )
    return total, weight, normaliser, ref_normaliser


def approximate_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    weight: Tensor,
    normaliser: Tensor,
    ref_normaliser: Tensor,
    d_total: Tensor,
    log2_eps: float,
    d_logits: Tensor,
) -> None:
    """Write d_total · (w - p W) of every row to d_logits [B, T, V]."""
    _launch(
        "approximate_kl_backward",
        logits,
        weight.dtype,
        logits,
        ref_logits,
        mask,
        weight,
        normaliser,
        ref_normaliser,
        d_total,
        d_logits,
        *logits.shape[1:],
        *_row_strides(logits),
        *_row_strides(ref_logits),
        *_row_strides(d_logits),
        LOG2_EPS=log2_eps,
    )
