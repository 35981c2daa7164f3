"""Errors that the script shows to its user as one line.

Each message says when it is raised, so docstrings do not list them.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """An error that the user can fix, shown without a traceback."""


def import_package(name: str, message: str) -> ModuleType:
    """Import an optional package, or raise a UserError with this message."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(message) from None


def one_line(error: Exception) -> str:
    """Return the first line of its message, or the name of its type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
