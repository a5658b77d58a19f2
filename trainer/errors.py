"""The one exception for what a user can cause, so that it is told in a sentence and not in a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a full disk


class UserError(Exception):
    """Says what is wrong, where, and what to do; ends a command with exit code 1."""


@contextmanager
def naming(subject: object) -> Iterator[None]:
    """Begin what is told inside by the setting or the file that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def first_line(error: object) -> str:
    """What an error says first; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
