"""The disk space that a run takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from reference.training.update.learner import Learner

MOMENTS = 2  # of AdamW, per weight


def describe_disk_use(directory: Path, learner: Learner) -> str:
    """Say how much disk space a run will take, and warn if less is free."""
    config, model = learner.config, learner.policy.model
    checkpoint = (1 + MOMENTS) * _size(learner.trained)
    reference = learner.reference_policy
    if reference is not None and not reference.without_adapter:
        checkpoint += _size(reference.model.parameters())
    whole = _size(model.parameters()) + _size(model.buffers())
    # A new checkpoint is complete before the last of the others is removed.
    count = max(2, config.keep_checkpoints)
    needed = count * checkpoint + whole
    free = shutil.disk_usage(directory).free
    line = (
        f"disk: up to {format_size(needed)} in {directory}, {count} checkpoints of "
        f"{format_size(checkpoint)} and the model of {format_size(whole)}; {format_size(free)} free"
    )
    if free + size_of(directory) < needed:
        line += "\nWARNING: the disk is too small for this run: name another --output-dir"
    return line


def describe_files(directory: Path) -> str:
    """List what a complete run has written, and say which part of it may be removed."""
    written = ", ".join(sorted(path.name for path in directory.iterdir()))
    line = f"in {directory}: {written}"
    if size := size_of(directory / "checkpoints"):
        more = f"only --resume {directory} --steps MORE needs them"
        line += f"\n{format_size(size)} of it in checkpoints: {more}"
    return line


def size_of(directory: Path) -> int:
    """Return the bytes of all files below a directory; 0 if it does not exist."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def format_size(size: float) -> str:
    """Write a number of bytes in the largest unit that leaves it above 1."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
