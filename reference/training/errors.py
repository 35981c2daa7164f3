"""What is said to the user of the script instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def one_line(error: Exception) -> str:
    """The first line of its message, or the name of its type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
