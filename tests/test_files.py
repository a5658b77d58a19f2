"""Files are replaced whole or not at all."""

import errno
import os

import pytest

from trainer import files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    files.write_atomic(path, b"old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full if name == "fsync" else lambda *_: full(0))
            files.write_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_keeps_its_mode_and_makes_its_folder(tmp_path):
    path = tmp_path / "deep" / "mine.toml"
    files.write_atomic(path, b"1")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    files.write_atomic(path, b"2")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"2", 0o600)


def test_many_files_change_only_once_all_their_contents_are_on_the_disk(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    files.write_all({path: b"old" for path in paths})
    written = []

    def full(prefix, dir):  # noqa: A002 - as tempfile calls it
        written.append(prefix)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return mkstemp(prefix=prefix, dir=dir)

    mkstemp = files.tempfile.mkstemp
    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_all({path: b"new" for path in paths})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {path: b"old" for path in paths}


def test_what_a_kill_leaves_is_cleared_and_nothing_else(tmp_path):
    for name in (".a.txt.abcd1234", ".b.txt.abcd1234", ".a.txt.ABCD1234", ".a.txt", "a.txt", f".{'n' * 60}.abcd1234"):
        (tmp_path / name).touch()
    files.clear_remains(tmp_path, ["a.txt", "n" * 100 + ".txt"])
    assert {path.name for path in tmp_path.iterdir()} == {".b.txt.abcd1234", ".a.txt.ABCD1234", ".a.txt", "a.txt"}


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 125 + ".txt")
    files.write_atomic(path, b"x")
    assert path.read_bytes() == b"x"


def test_a_file_written_piece_by_piece_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "deep" / "large.bin"
    with files.replacing(path) as file:
        file.write(b"123")
        file.seek(0)
        file.write(b"9")
        assert not path.exists()
    assert path.read_bytes() == b"923" and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"923" and list(path.parent.iterdir()) == [path]
