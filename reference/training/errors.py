"""Errors that the script shows to its user as one line.

Each message says when it is raised, so docstrings do not list them.
"""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix, shown without a traceback."""


def one_line(error: Exception) -> str:
    """Return the first line of its message, or the name of its type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
