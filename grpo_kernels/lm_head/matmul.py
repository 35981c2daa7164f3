"""The three matrix products of a language model's head, from half-precision operands unrounded.

A GPU multiplies bf16 and keeps fp32 (`out_dtype`). On a CPU a product has its operands' dtype. So
the weight is upcast for the logits there, a tile of the vocabulary at a time: rounded to bf16 they
would cost a log-prob 1e-2. The gradients, of which one operand, d_logits, is rounded anyway, are
products of bf16, twice as fast where the processor has units for it; else bf16 takes 70 times as
long as fp32 (AVX2, 10.5 s against 0.15): there they are made of upcast tiles as well. What is still
to be added up over chunks is made in fp32.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..workspace import Workspace

TILE_BYTES = 32 << 20  # 4,096 entries of Llama's vocabulary; 3.4 s, against 4.7 at 1,024 and 4.1 at
# 16,384, for the logits of 1,024 tokens on two cores


def _tiles(V: int, H: int) -> Iterator[slice]:
    """The vocabulary in parts whose fp32 weight takes TILE_BYTES."""
    size = max(64, TILE_BYTES // (4 * H))
    return (slice(start, min(V, start + size)) for start in range(0, V, size))


@cache
def has_bf16_units() -> bool:
    """Whether this processor multiplies bf16 itself."""
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and known is not None and bool(known())


def _is_upcast(operand: Tensor) -> bool:
    """Whether products of this operand are faster after a conversion to fp32."""
    is_bf16_on_cpu = operand.dtype == torch.bfloat16 and operand.device.type == "cpu"
    return is_bf16_on_cpu and not has_bf16_units()


def _upcast(
    name: str, part: Tensor, workspace: Workspace, dtype: torch.dtype = torch.float32
) -> Tensor:
    """In a buffer: fresh memory for each tile would take longer than the conversion."""
    return workspace(name, *part.shape, dtype=dtype).copy_(part)


def write_logits(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: Workspace
) -> None:
    """logits [n, V] = hidden [n, H] @ weight [V, H].T + bias [V], in the dtype of logits."""
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
    else:
        wide = _upcast("hidden", hidden, workspace, logits.dtype)
        for tile in _tiles(*weight.shape):
            part = _upcast("weight", weight[tile], workspace, logits.dtype)
            torch.mm(wide, part.t(), out=logits[:, tile])
    if bias is not None:
        logits.add_(bias)


def write_hidden_gradient(
    d_hidden: Tensor, d_logits: Tensor, weight: Tensor, workspace: Workspace
) -> None:
    """d_hidden [n, H] = d_logits [n, V] @ weight [V, H], in the dtype of d_hidden."""
    if _is_upcast(weight):
        total = workspace("d_hidden", *d_hidden.shape, dtype=torch.float32).zero_()
        for tile in _tiles(*weight.shape):
            d_tile = _upcast("d_logits", d_logits[:, tile], workspace)
            torch.addmm(total, d_tile, _upcast("weight", weight[tile], workspace), out=total)
        d_hidden.copy_(total)
    elif weight.dtype == d_hidden.dtype:
        torch.mm(d_logits, weight, out=d_hidden)
    else:
        torch.mm(d_logits, weight, out_dtype=d_hidden.dtype, out=d_hidden)


def add_weight_gradient(
    d_weight: Tensor, d_logits: Tensor, hidden: Tensor, workspace: Workspace, *, first: bool
) -> None:
    """d_weight [V, H] += d_logits [n, V].T @ hidden [n, H], in its own dtype; = for the first."""
    dtype = d_weight.dtype
    unrounded = {"out_dtype": dtype} if hidden.is_cuda and hidden.dtype != dtype else {}
    if unrounded or (hidden.dtype == dtype and not _is_upcast(hidden)):
        if first:
            torch.mm(d_logits.t(), hidden, **unrounded, out=d_weight)
        else:
            torch.addmm(d_weight, d_logits.t(), hidden, **unrounded, out=d_weight)
        return
    wide = _upcast("hidden", hidden, workspace)
    for tile in _tiles(*d_weight.shape):
        d_tile = _upcast("d_logits", d_logits[:, tile], workspace).t()
        if dtype != wide.dtype:  # a single chunk: rounded once, here
            product = workspace("d_weight", *d_weight[tile].shape, dtype=wide.dtype)
            d_weight[tile].copy_(torch.mm(d_tile, wide, out=product))
        elif first:
            torch.mm(d_tile, wide, out=d_weight[tile])
        else:
            torch.addmm(d_weight[tile], d_tile, wide, out=d_weight[tile])
