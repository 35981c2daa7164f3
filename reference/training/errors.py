"""Errors that the script shows to its user as one line.

Each message says when it is raised, so docstrings do not list them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from grpo_kernels.validation import nearest


class UserError(Exception):
    """An error that the user can fix, shown without a traceback."""


def import_package(name: str, message: str) -> ModuleType:
    """Import an optional package, or raise a UserError with this message."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(message) from None


def discard_stdout() -> None:
    """Discard what is still printed: the reader of the output has gone.

    Otherwise Python complains when it flushes stdout at its end.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def one_line(error: Exception) -> str:
    """Return the first line of its message, or the name of its type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def did_you_mean(given: str, choices: Collection[str]) -> str:
    """Return "; did you mean ...?" with the nearest choice, or nothing if none is near."""
    return "".join(f"; did you mean {near}?" for near in nearest(given, choices))


def near_path(path: Path) -> str:
    """Return "; did you mean ...?" with a path that exists and is near to a missing one."""
    existing = next((parent for parent in path.parents if parent.exists()), None)
    if existing is None:  # the root of the file system
        return ""
    missing, *rest = path.relative_to(existing).parts
    try:
        near = nearest(missing, [entry.name for entry in existing.iterdir()])
    except OSError:
        near = []
    whole = [existing.joinpath(name, *rest) for name in near]
    return "".join(f"; did you mean {meant}?" for meant in whole if meant.exists())
