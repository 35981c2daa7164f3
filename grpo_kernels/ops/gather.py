"""Weights that are sharded over ranks, whole for the length of a call."""

import sys

import torch
from torch import Tensor


def gathered(weight: Tensor | None) -> Tensor | None:
    """The whole of a DTensor, on every rank; any other tensor as it is.

    The gradient that comes back is the mean over ranks, in the shards of the weight: what FSDP
    makes of ranks that see different data, and what ranks that see the same data have already.
    """
    # A DTensor exists only where its module has been imported, which costs seconds.
    module = sys.modules.get("torch.distributed.tensor")
    if weight is None or module is None or not isinstance(weight, module.DTensor):
        return weight
    return _Gather.apply(weight)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        return weight.full_tensor()

    @staticmethod
    def backward(ctx, gradient):
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        total = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim)
        return total.redistribute(mesh, ctx.placements)
