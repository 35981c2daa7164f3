"""The three matrix products of a language model's head, without rounding half-precision results.

A GPU multiplies bf16 and returns fp32 (`out_dtype`). On a CPU a product has its operands' dtype:

* Logits. The weight is upcast, a tile of the vocabulary at a time. Logits rounded to bf16 would
  cost a log-prob 1e-2.
* Gradients. d_logits is rounded anyway, so these are products of bf16, twice as fast where the
  processor has units for it. Without such units bf16 takes 70 times as long as fp32 (AVX2, 10.5 s
  against 0.15), and the gradients are products of upcast tiles too. So are those of fp16, because
  row_scale.py scales d_logits up to the limit of fp16. Sums over chunks are in fp32.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..workspace import Workspace

TILE_BYTES = 32 << 20  # 4,096 entries of Llama's vocabulary; 3.4 s, against 4.7 at 1,024 and 4.1 at
# 16,384, for the logits of 1,024 tokens on two cores


def write_logits(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: Workspace
) -> None:
    """Compute logits [n, V] = hidden [n, H] @ weight [V, H].T + bias [V], in the logits' dtype."""
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
    else:
        hidden = workspace.cast("hidden", hidden, logits.dtype)
        for tile in vocab_tiles(*weight.shape):
            weight_tile = workspace.cast("weight", weight[tile], logits.dtype)
            torch.mm(hidden, weight_tile.t(), out=logits[:, tile])
    if bias is not None:
        logits.add_(bias)


def write_hidden_gradient(
    d_hidden: Tensor, d_logits: Tensor, weight: Tensor, workspace: Workspace
) -> None:
    """Compute d_hidden [n, H] = d_logits [n, V] @ weight [V, H], in the dtype of d_hidden."""
    if is_upcast(d_logits, weight):
        total = workspace("d_hidden", *d_hidden.shape, dtype=torch.float32).zero_()
        for tile in vocab_tiles(*weight.shape):
            d_tile = workspace.cast("d_logits", d_logits[:, tile], torch.float32)
            weight_tile = workspace.cast("weight", weight[tile], torch.float32)
            torch.addmm(total, d_tile, weight_tile, out=total)
        d_hidden.copy_(total)
    elif weight.dtype == d_hidden.dtype:
        torch.mm(d_logits, weight, out=d_hidden)
    else:
        torch.mm(d_logits, weight, out_dtype=d_hidden.dtype, out=d_hidden)


def add_weight_gradient(
    d_weight: Tensor, d_logits: Tensor, hidden: Tensor, workspace: Workspace, *, first: bool
) -> None:
    """Add d_logits [n, V].T @ hidden [n, H] to d_weight [V, H]; with first, overwrite it."""
    dtype = d_weight.dtype
    unrounded: dict[str, Any] = (
        {"out_dtype": dtype} if hidden.is_cuda and hidden.dtype != dtype else {}
    )
    if unrounded or (hidden.dtype == dtype and not is_upcast(d_logits, hidden)):
        if first:
            torch.mm(d_logits.t(), hidden, **unrounded, out=d_weight)
        else:
            torch.addmm(d_weight, d_logits.t(), hidden, **unrounded, out=d_weight)
        return
    hidden = workspace.cast("hidden", hidden, torch.float32)
    for tile in vocab_tiles(*d_weight.shape):
        d_tile = workspace.cast("d_logits", d_logits[:, tile], torch.float32).t()
        if dtype != hidden.dtype:  # a single chunk: rounded once, here
            product = workspace("d_weight", *d_weight[tile].shape, dtype=hidden.dtype)
            d_weight[tile].copy_(torch.mm(d_tile, hidden, out=product))
        elif first:
            torch.mm(d_tile, hidden, out=d_weight[tile])
        else:
            torch.addmm(d_weight[tile], d_tile, hidden, out=d_weight[tile])


def vocab_tiles(V: int, H: int) -> Iterator[slice]:
    """Split the vocabulary into parts whose fp32 weight takes TILE_BYTES, less if H is small."""
    size = max(64, TILE_BYTES // (4 * max(H, 1024)))
    return (slice(start, min(V, start + size)) for start in range(0, V, size))


def is_upcast(d_logits: Tensor, operand: Tensor) -> bool:
    """Tell whether the product is made of operands that are converted to fp32 first.

    Only CUDA returns fp32 for half-precision operands. Elsewhere operands of two dtypes have no
    product without a conversion, and that of fp16 has no range. On a CPU without units for bf16
    the conversion is faster.
    """
    if d_logits.is_cuda:
        return False
    if d_logits.dtype != operand.dtype or operand.dtype == torch.float16:
        return True
    is_bf16_on_cpu = operand.dtype == torch.bfloat16 and operand.device.type == "cpu"
    return is_bf16_on_cpu and not has_bf16_units()


@cache
def has_bf16_units() -> bool:
    """Tell whether this processor multiplies bf16 itself."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())
