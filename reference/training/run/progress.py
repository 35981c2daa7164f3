"""The progress bar of a run, and the memory that it uses."""

from __future__ import annotations

import sys

import psutil
import torch
from tqdm import tqdm


def progress_bar(name: str, done: int, steps: int, visible: bool) -> tqdm:
    """Iterate over the steps that are left."""
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file needs few lines
    return tqdm(
        range(done + 1, steps + 1),
        name,
        initial=done,
        total=steps,
        unit="step",
        dynamic_ncols=True,
        mininterval=interval,
        disable=not visible,
    )


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of a GPU, or the current memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
