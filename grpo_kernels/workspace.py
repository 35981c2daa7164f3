"""Memory that is allocated once by its name and used again for every chunk or block of rows.

New memory costs a CPU a page fault every 4 KiB, about as much as a pass over it, and a GPU's
allocator a search. Named memory also shows in one place what a loop holds beside its results.
"""

import threading
from math import prod

import torch
from torch import Tensor

ROW_BYTES = 16  # one access of a GPU's thread, and what cuBLAS asks of a leading dimension


def row_stride(V: int, dtype: torch.dtype) -> int:
    """Return the entries from one row of V to the next: rows start at multiples of ROW_BYTES."""
    return V + -V % (ROW_BYTES // dtype.itemsize)


def new_rows(like: Tensor, n: int, V: int) -> Tensor:
    """Make an uninitialised tensor [n, V] of the dtype and device of `like`, strided as above."""
    return like.new_empty_strided((n, V), (row_stride(V, like.dtype), 1))


class Workspace:
    """Uninitialised tensors by name. Asking for a name again reuses its memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor [*shape]; allocate only where it is larger than before."""
        tensor, count = self._tensors.get((name, dtype)), prod(shape)
        if tensor is None or tensor.numel() < count:
            with torch.inference_mode(False):  # made inside, it could not be written to outside
                tensor = torch.empty(count, dtype=dtype, device=self._device)
            self._tensors[name, dtype] = tensor
        return tensor[:count].view(shape)

    def rows(self, name: str, n: int, V: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor [n, V] of this row_stride."""
        return self(name, n, row_stride(V, dtype), dtype=dtype)[:, :V]

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x in another dtype: x itself where it has it, else a copy in this workspace."""
        return x if x.dtype == dtype else self(name, *x.shape, dtype=dtype).copy_(x)


_thread = threading.local()


def thread_workspace(device: torch.device) -> Workspace:
    """Return the workspace that this thread keeps from call to call, for blocks of a few MiB.

    6 MiB allocated anew for each call are 1,500 page faults: a loss and gradient of 64 x 49,152
    took 51 ms against 33, alternating on a busy machine. On other devices the allocator is fast,
    and knows which stream still reads what: there each call gets a new workspace.
    """
    if device.type != "cpu":
        return Workspace(device)
    workspaces = _thread.__dict__.setdefault("workspaces", {})
    return workspaces.setdefault(device, Workspace(device))
