"""Memory that is made once by its name and used again for every chunk of a call.

New memory costs a CPU a page fault every 4 KiB, about as much as a pass over it, and a GPU's
allocator a search; and what a loop holds beside its results is then seen in one place.
"""

from math import prod

import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors by name; one that is asked for again must be no longer in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._named: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """[*shape], contiguous; new memory only where it is larger than ever before."""
        kept, count = self._named.get((name, dtype)), prod(shape)
        if kept is None or kept.numel() < count:
            kept = torch.empty(count, dtype=dtype, device=self._device)
            self._named[name, dtype] = kept
        return kept[:count].view(shape)
