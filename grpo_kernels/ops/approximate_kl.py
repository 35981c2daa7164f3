"""The vocabulary sum of mini-GRPO's approximate KL, one number per token, as an operator."""

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for
from ..backends.interface import accumulation_dtype


@torch.library.custom_op("grpo_kernels::approximate_kl_forward", mutates_args=())
def _forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    return backend_for(logits).approximate_kl_forward(logits, ref_logits, mask, log2_eps, dtype)


@_forward.register_fake
def _(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def output(*pair: int) -> Tensor:
        return logits.new_empty((*mask.shape, *pair), dtype=accumulation_dtype(logits.dtype))

    return output(), output(), output(2), output(2)


@torch.library.custom_op("grpo_kernels::approximate_kl_backward", mutates_args=())
def _backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    weight: Tensor,
    row_lse: Tensor,
    ref_row_lse: Tensor,
    d_total: Tensor,
    log2_eps: float,
) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    backend_for(logits).approximate_kl_backward(
        logits, ref_logits, mask, weight, row_lse, ref_row_lse, d_total, log2_eps, d_logits
    )
    return d_logits


@_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, mask, ctx.log2_eps = inputs
    ctx.save_for_backward(logits, ref_logits, mask, *output[1:])


def _autograd(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    d_logits = _backward(*ctx.saved_tensors, d_total.contiguous(), ctx.log2_eps)
    return d_logits, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def approximate_kl_sums(ref_logits: Tensor, new_logits: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Sum q/p - ln(q/p) - 1 over the vocabulary, p of new_logits, q of ref_logits, at least eps.

    Args:
        ref_logits, new_logits: [B, T, V].
        mask: [B, T], bool.

    Returns:
        [B, T], fp32 (fp64 for fp64 logits), 0 where masked, differentiable in `new_logits`.
    """
    return _forward(new_logits, ref_logits.detach(), mask, math.log2(eps))[0]
