"""Row functions: the one place that picks Triton or chunked PyTorch for a tensor.

Both rooms offer the same functions over the rows of [B, T, V]. The normaliser that a forward
returns goes back into the same room's backward: the row's maximum, and log2 of its sum. In between
only vocab_shards.py reads it, to make that of a row from those of its shards.
"""

import os
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from . import pytorch as eager

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def room(logits: Tensor) -> ModuleType:
    """kernels.calls for CUDA tensors and, under Triton's interpreter, CPU tensors; else eager."""
    if HAS_TRITON and (logits.is_cuda or (INTERPRETED and logits.device.type == "cpu")):
        from .triton import launchers as calls

        return calls
    return eager
