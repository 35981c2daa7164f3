"""The vocabulary sum of mini-GRPO's approximate KL, one number per token, as an operator."""

import math

import torch
from torch import Tensor

from ..backends import backend_for
from ..backends.interface import ApproximateKL, accumulation_dtype


@torch.library.custom_op("grpo_kernels::approximate_kl_forward", mutates_args=())
def _forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(backend_for(logits).approximate_kl_forward(logits, ref_logits, mask, log2_eps))


@_forward.register_fake
def _(logits, ref_logits, mask, log2_eps):
    def output(*pair: int) -> Tensor:
        return logits.new_empty((*mask.shape, *pair), dtype=accumulation_dtype(logits.dtype))

    return output(), output(), output(2), output(2)


@torch.library.custom_op("grpo_kernels::approximate_kl_backward", mutates_args=())
def _backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    weight_sum: Tensor,
    row_lse: Tensor,
    ref_row_lse: Tensor,
    d_total: Tensor,
    log2_eps: float,
) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    kl = ApproximateKL(weight_sum, weight_sum, row_lse, ref_row_lse)  # the total is not read
    backend_for(logits).approximate_kl_backward(
        logits, ref_logits, mask, kl, d_total, log2_eps, d_logits
    )
    return d_logits


@_backward.register_fake
def _(logits, *args):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits, ref_logits, mask, ctx.log2_eps = inputs
    ctx.save_for_backward(logits, ref_logits, mask, *output[1:])


def _autograd(ctx, d_total, *unused):
    d_logits = _backward(*ctx.saved_tensors, d_total.contiguous(), ctx.log2_eps)
    return d_logits, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def approximate_kl_sums(ref_logits: Tensor, new_logits: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Σ over the vocabulary of q/p - ln(q/p) - 1, p of new_logits, q of ref_logits, at least eps.

    Args:
        ref_logits, new_logits: [B, T, V]; mask: [B, T] bool.

    Returns:
        [B, T], fp32 (fp64 for fp64 logits), 0 where masked, differentiable in `new_logits`.
    """
    return _forward(new_logits, ref_logits.detach(), mask, math.log2(eps))[0]
