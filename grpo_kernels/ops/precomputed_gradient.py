"""Attach a precomputed gradient to a loss; backward scales it by the incoming gradient."""

import torch
from torch import Tensor

from ..backends import backend_for


@torch.library.custom_op("grpo_kernels::scale_", mutates_args={"x"})
def _scale_(x: Tensor, factor: Tensor) -> None:
    """x · factor in place; where the 0-dim factor is 1, as in loss.backward(), nothing is read."""
    rows = x[(None,) * (3 - x.dim())]
    backend_for(rows).scale_(rows, factor)


@_scale_.register_fake
def _(x, factor):
    return None


def attach_gradient(loss: Tensor, leaves: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """The loss, 0-dim, with the gradient of each leaf to hand out in backward, times its own.

    They are handed out in their own memory: nothing of their size is allocated, nor moved where
    the loss's gradient is 1. A leaf of another dtype gets the product, rounded once.
    """
    return _PrecomputedGradient.apply(loss, len(leaves), *leaves, *gradients)


class _PrecomputedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, count, *leaves_and_gradients):
        leaves, gradients = leaves_and_gradients[:count], leaves_and_gradients[count:]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        ctx.factor = None  # by which what is saved has been multiplied
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss):
        gradients = ctx.saved_tensors
        if torch.compiler.is_compiling():
            found = [(x * d_loss).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)]
        else:
            if torch.is_grad_enabled():
                raise RuntimeError("a loss whose gradient is made with it has no second derivative")
            found = _hand_out(ctx, gradients, d_loss)
        return None, None, *found, *(None,) * len(gradients)


def _hand_out(ctx, gradients: tuple[Tensor, ...], d_loss: Tensor) -> list[Tensor]:
    first = ctx.factor is None
    found = []
    for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
        if gradient.dtype != dtype:
            product = torch.empty_like(gradient, dtype=dtype)
            found.append(torch.mul(gradient, d_loss, out=product))
        elif first:
            # .data, as a backward after this one (retain_graph) finds what it needs below.
            _scale_(gradient.data, d_loss)
            found.append(gradient)
        elif ctx.factor == 0:
            raise RuntimeError("backward came again, after one in which the loss's gradient was 0")
        else:
            found.append(gradient * (d_loss / ctx.factor).to(gradient.dtype))
    if first:
        ctx.factor = d_loss.clone()  # the caller may use his tensor again
    return found
