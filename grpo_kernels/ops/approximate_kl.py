"""The vocabulary sum of mini-GRPO's approximate KL, one number per token, as an operator."""

import math
from typing import Any

from torch import Tensor

from ..backends import backend_for
from ..backends.interface import ApproximateKL, accumulation_dtype
from .bundled_op import bundled_op


@bundled_op("approximate_kl_forward")
def _forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(backend_for(logits).approximate_kl_forward(logits, ref_logits, mask, log2_eps))


@_forward.register_fake
def _(logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float) -> tuple[Tensor, ...]:
    def output(*pair: int) -> Tensor:
        return logits.new_empty((*mask.shape, *pair), dtype=accumulation_dtype(logits.dtype))

    return output(), output(), output(2), output(2)


@bundled_op("approximate_kl_backward")
def _backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    kl: ApproximateKL,
    d_total: Tensor,
    log2_eps: float,
) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    backend_for(logits).approximate_kl_backward(
        logits, ref_logits, mask, kl, d_total, log2_eps, d_logits
    )
    return d_logits


@_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, arguments: list, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.log2_eps = arguments
    _, *saved = output  # backward does not read the totals
    ctx.save_for_backward(*tensors, *saved)


def _autograd(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Tensor]:
    logits, ref_logits, mask, *saved = ctx.saved_tensors
    kl = ApproximateKL(None, *saved)
    return (_backward(logits, ref_logits, mask, kl, d_total.contiguous(), ctx.log2_eps),)


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
