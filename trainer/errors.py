"""The one exception for what a user can cause, so that it is told in a sentence and not in a traceback."""


class UserError(Exception):
    """Says what is wrong, where, and what to do; ends a command with exit code 1."""
