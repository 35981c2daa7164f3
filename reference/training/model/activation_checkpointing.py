"""Activation checkpointing: backward computes the activations of each layer again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recompute_activations(model: nn.Module) -> Iterator[None]:
    """Inside this context the autograd graph keeps only the inputs of layers.

    The switch of transformers itself acts in training mode only. Our models are in evaluation mode,
    to have no dropout, and would keep every activation without a warning. A pass with a key-value
    cache cannot be recomputed either way: the layers would append to the cache twice.
    """
    layers = checkpointable_layers(model)
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers declares fit for activation checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
