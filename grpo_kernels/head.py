"""The three matrix products of a language model's head, from half-precision operands unrounded.

A GPU multiplies bf16 and keeps fp32 (`out_dtype`). On a CPU a product has its operands' dtype, so
for the logits the weight is upcast, a tile of the vocabulary at a time: rounded to bf16 they would
cost a log-prob 1e-2. The gradient of the logits is rounded to bf16 before its products, and those
are made in bf16, twice as fast as in fp32: the relative error of d_hidden and d_weight is 2.4e-3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 32 << 20  # 4,096 entries of Llama's vocabulary; 3.4 s, against 4.7 at 1,024 and 4.1 at
# 16,384, for the logits of 1,024 tokens on two cores


def _tiles(V: int, H: int) -> Iterator[slice]:
    """The vocabulary in parts whose fp32 weight takes TILE_BYTES."""
    size = max(64, TILE_BYTES // (4 * H))
    return (slice(start, min(V, start + size)) for start in range(0, V, size))


def write_logits(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """logits [n, V] = hidden [n, H] @ weight [V, H].T + bias [V], in the dtype of logits."""
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
    else:
        wide = hidden.to(logits.dtype)
        for tile in _tiles(*weight.shape):
            torch.mm(wide, weight[tile].to(logits.dtype).t(), out=logits[:, tile])
    if bias is not None:
        logits.add_(bias)


def hidden_gradient(d_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """d_logits [n, V] @ weight [V, H], in dtype."""
    if weight.dtype != dtype and weight.is_cuda:
        return torch.mm(d_logits, weight, out_dtype=dtype)
    return torch.mm(d_logits, weight).to(dtype)


def add_weight_gradient(d_weight: Tensor, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
    """d_weight [V, H] += d_logits [n, V].T @ hidden [n, H], in its own dtype; = for the first."""
    if hidden.dtype == d_weight.dtype:
        if first:
            torch.mm(d_logits.t(), hidden, out=d_weight)
        else:
            torch.addmm(d_weight, d_logits.t(), hidden, out=d_weight)
    elif hidden.is_cuda:
        if first:
            torch.mm(d_logits.t(), hidden, out_dtype=d_weight.dtype, out=d_weight)
        else:
            torch.addmm(d_weight, d_logits.t(), hidden, out_dtype=d_weight.dtype, out=d_weight)
    else:
        for tile in _tiles(*d_weight.shape):
            product = torch.mm(d_logits[:, tile].t(), hidden)
            if first:
                d_weight[tile] = product
            else:
                d_weight[tile] += product
