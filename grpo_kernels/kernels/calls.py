"""Host side of the kernels: outputs, strides and grids, behind the same functions as eager/."""

import os

import torch
import triton.language as tl
from torch import Tensor

from ..launch import pick_row_launch
from .approximate_kl import _approximate_kl_backward_kernel, _approximate_kl_forward_kernel
from .token_stats import _token_stats_backward_kernel, _token_stats_forward_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _launch(kernel: str, logits: Tensor, acc: torch.dtype) -> dict[str, object]:
    """The keywords of a launch: accumulation dtype, tile and warps."""
    pick = pick_row_launch(kernel, logits.shape[-1], logits.element_size(), interpreted=INTERPRETED)
    return {
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "UNROLL": pick.unroll,
        "LANES": pick.lanes,
        "VEC": pick.vector,
        "num_warps": pick.num_warps,
    }


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
    """(logprob, entropy, kl, normaliser, ref_normaliser) of every row of logits [B, T, V]."""
    _, T, V = logits.shape
    acc = temperature.dtype
    logprob = logits.new_empty(tokens.shape, dtype=acc)
    normaliser = logits.new_empty((*tokens.shape, 2), dtype=acc)
    entropy_value = torch.empty_like(logprob) if entropy else None
    kl_value = torch.empty_like(logprob) if kl else None
    ref_normaliser = torch.empty_like(normaliser) if kl else None
    if tokens.numel():
        _token_stats_forward_kernel[(tokens.numel(),)](
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
            T,
            V,
            *_row_strides(logits),
            *_row_strides(ref_logits),
            temperature.stride(-1),
            KL=kl or "none",
            SOFTCAP=softcap,
            **_launch("token_stats_forward", logits, acc),
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
    _, T, V = logits.shape
    if d_kl is None:
        ref_logits = ref_normaliser = kl_value = kl = None
    if tokens.numel():
        _token_stats_backward_kernel[(tokens.numel(),)](
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
            T,
            V,
            *_row_strides(logits),
            *_row_strides(ref_logits),
            *_row_strides(d_logits),
            temperature.stride(-1),
            KL=kl or "none",
            SOFTCAP=softcap,
            **_launch("token_stats_backward", logits, temperature.dtype),
        )


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, W, normaliser, ref_normaliser) of every row of [B, T, V]; mask [B, T]."""
    _, T, V = logits.shape
    total = logits.new_empty(mask.shape, dtype=dtype)
    weight = torch.empty_like(total)
    normaliser = logits.new_empty((*mask.shape, 2), dtype=dtype)
    ref_normaliser = torch.empty_like(normaliser)
    if mask.numel():
        _approximate_kl_forward_kernel[(mask.numel(),)](
            logits,
            ref_logits,
            mask,
            total,
            weight,
            normaliser,
            ref_normaliser,
            T,
            V,
            *_row_strides(logits),
            *_row_strides(ref_logits),
            LOG2_EPS=log2_eps,
            **_launch("approximate_kl_forward", logits, dtype),
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
    _, T, V = logits.shape
    if mask.numel():
        _approximate_kl_backward_kernel[(mask.numel(),)](
            logits,
            ref_logits,
            mask,
            weight,
            normaliser,
            ref_normaliser,
            d_total,
            d_logits,
            T,
            V,
            *_row_strides(logits),
            *_row_strides(ref_logits),
            *_row_strides(d_logits),
            LOG2_EPS=log2_eps,
            **_launch("approximate_kl_backward", logits, weight.dtype),
        )
