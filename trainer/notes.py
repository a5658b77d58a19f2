"""A person's own notes on a run: a plain text file in its folder."""

from __future__ import annotations

from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.run import Run

MOST = 100_000  # characters


def read(run: Run) -> str:
    """The notes; "" when there are none.  What is beyond the limit is left out."""
    try:
        with open(run.notes, encoding="utf-8", errors="replace") as file:
            return file.read(MOST)
    except OSError:
        return ""


def write(run: Run, text: str) -> None:
    """Replace the notes; empty ones take the file away.

    `UserError` for more than the limit, for a run that is gone, and for a file that was made longer elsewhere: `read`
    has not shown all that would be lost.
    """
    if len(text) > MOST:
        raise UserError(f"the notes have {len(text):,} characters, and {MOST:,} is the most; shorten them")
    if _is_cut_short(run):
        raise UserError(f"{run.notes} is longer than the {MOST:,} characters shown here, and saving would lose "
                        "the rest; shorten that file with an editor first")
    if not run.path.is_dir():
        raise UserError(f"there is no run called {run.name!r} any more; its notes are not saved")
    if text.strip():
        write_atomic(run.notes, text.encode("utf-8", errors="replace"))
    else:
        run.notes.unlink(missing_ok=True)


def _is_cut_short(run: Run) -> bool:
    try:
        with open(run.notes, encoding="utf-8", errors="replace") as file:
            return len(file.read(MOST + 1)) > MOST
    except FileNotFoundError:
        return False
    except OSError as error:  # what cannot be read is not to be replaced either
        raise UserError(f"{run.notes} cannot be read, so that the notes are not saved: {error.strerror}"
                        ) from None
