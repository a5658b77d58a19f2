"""A person's own notes on a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainer import notes
from trainer import run as runs
from trainer.errors import UserError


def test_notes_are_kept_as_they_are_written_and_empty_ones_leave_no_file(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "cat", "")
    assert notes.read(run) == ""
    notes.write(run, "# why\nrank 8 was too small — ünd\ud800")
    assert notes.read(run) == "# why\nrank 8 was too small — ünd?"
    notes.write(run, " \n")
    assert notes.read(run) == "" and not run.notes.exists()
    notes.write(run, "")


def test_too_long_notes_are_refused_and_the_old_ones_stay(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "cat", "")
    notes.write(run, "a" * notes.MOST)
    with pytest.raises(UserError, match="the notes have 100,001 characters, and 100,000 is the most"):
        notes.write(run, "b" * (notes.MOST + 1))
    assert notes.read(run) == "a" * notes.MOST
    run.notes.write_text("c" * (notes.MOST + 9))
    assert notes.read(run) == "c" * notes.MOST


@pytest.mark.parametrize("text", ["mine", ""])
def test_what_was_not_shown_is_never_lost(tmp_path: Path, text: str) -> None:
    run = runs.create(tmp_path, "cat", "")
    file = run.notes
    long = "c" * notes.MOST + "the end"
    file.write_text(long)
    with pytest.raises(UserError, match=r"cat/notes\.md is longer than the 100,000 characters shown here"):
        notes.write(run, text)
    assert file.read_text() == long
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"notes\.md cannot be read"):
        notes.write(run, text)


def test_notes_do_not_bring_a_deleted_run_back(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "cat", "")
    shutil.rmtree(run.path)
    with pytest.raises(UserError, match="there is no run called 'cat' any more"):
        notes.write(run, "late")
    assert not run.path.exists()
