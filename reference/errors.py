"""What is said to the user of the script instead of a traceback."""


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""
