"""Attach a precomputed gradient to a loss; backward scales it by the incoming gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..backends import backend_for


@torch.library.custom_op(add_op_namespace_prefix("scale_"), mutates_args={"x"})
def _scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x in place; a 0-dim factor of 1, as in loss.backward(), reads nothing."""
    rows = x[(None,) * (3 - x.dim())]
    backend_for(rows).scale_(rows, factor)


@_scale_.register_fake
def _(x: Tensor, factor: Tensor) -> None:
    return None


def attach_gradient(loss: Tensor, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return the 0-dim loss, whose backward gives each leaf its gradient times the incoming one.

    The gradients are returned in their own memory: nothing of their size is allocated, and nothing
    is copied where the incoming gradient is 1. A leaf of another dtype gets the product, rounded
    once.
    """
    return _PrecomputedGradient.apply(loss, len(leaves), *leaves, *grads)


class _PrecomputedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *leaves_and_grads: Tensor) -> Tensor:
        leaves, grads = leaves_and_grads[:count], leaves_and_grads[count:]
        ctx.save_for_backward(*grads)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        ctx.factor = None  # by which the saved gradients have been multiplied
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients in their own memory; a second backward finds them scaled."""
        grads = ctx.saved_tensors
        unused = (None,) * len(grads)
        if torch.compiler.is_compiling():
            scaled = [(x * d_loss).to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)]
            return None, None, *scaled, *unused
        if torch.is_grad_enabled():
            raise RuntimeError("a loss whose gradient is made with it has no second derivative")
        is_first, scaled = ctx.factor is None, []
        for grad, dtype in zip(grads, ctx.dtypes, strict=True):
            if grad.dtype != dtype:
                scaled.append(torch.mul(grad, d_loss, out=torch.empty_like(grad, dtype=dtype)))
            elif is_first:
                # .data hides the write from autograd: a later backward (retain_graph) needs `grad`.
                _scale_(grad.data, d_loss)
                scaled.append(grad)
            elif ctx.factor == 0:
                raise RuntimeError(
                    "backward came again, after one in which the loss's gradient was 0"
                )
            else:
                scaled.append(grad * (d_loss / ctx.factor).to(grad.dtype))
        if is_first:
            ctx.factor = d_loss.clone()  # the caller may overwrite d_loss
        return None, None, *scaled, *unused
