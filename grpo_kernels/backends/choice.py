"""The choice of a backend: by the device of a tensor, or by `use`."""

from functools import cache
from types import ModuleType, TracebackType
from typing import Literal

import torch
from torch import Tensor

from . import pytorch
from .availability import HAS_TRITON, INTERPRETED

Backend = Literal["triton", "pytorch"]
OLDEST_CAPABILITY = (8, 0)  # of an NVIDIA GPU that Triton supports; a T4 has 7.5
_chosen: Backend | None = None


def backend_for(logits: Tensor) -> ModuleType:
    """Return the backend module that serves these logits.

    Without `use`, Triton serves tensors on a GPU that it supports and, under its interpreter, CPU
    tensors. PyTorch serves all others.
    """
    runs_triton = HAS_TRITON and (logits.is_cuda or (INTERPRETED and logits.device.type == "cpu"))
    if _chosen is None and runs_triton and logits.is_cuda:
        runs_triton = _is_supported(logits.device)
    if _chosen == "triton" and not runs_triton:
        raise RuntimeError(
            f"backend 'triton' was chosen and cannot run on {logits.device}: it needs Triton and a "
            "CUDA tensor, or TRITON_INTERPRET=1 set before the first import"
        )
    if runs_triton and _chosen != "pytorch":
        from .triton import launchers

        return launchers
    return pytorch


@cache
def _is_supported(device: torch.device) -> bool:
    """Return whether Triton supports a GPU; `use("triton")` tries it on others too."""
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


class use:
    """Choose the backend of all later calls in this process, on every thread.

        use("pytorch")              # from now on
        with use("pytorch"): ...    # inside the block; the earlier choice returns after it
        use(None)                   # choose by the device of each tensor again

    Args:
        name: "triton", "pytorch", or None.

    Raises:
        ValueError: the name is another, or "triton" is chosen where Triton is not installed.
    """

    def __init__(self, name: Backend | None) -> None:
        global _chosen
        if name not in ("triton", "pytorch", None):
            raise ValueError(f"name must be 'triton', 'pytorch' or None, got {name!r}")
        if name == "triton" and not HAS_TRITON:
            raise ValueError("backend 'triton' needs the triton package, which is not installed")
        self._before: Backend | None = _chosen
        _chosen = name

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._before
