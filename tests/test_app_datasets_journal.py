"""The journal undoes and redoes every byte, after a restart too, and destroys nothing that others wrote."""

import json
import os

import pytest

from app.datasets import journal as journals
from app.datasets.changes import Move, Write
from app.datasets.journal import Changed, Journal
from trainer.errors import UserError

ODD = [b"\xef\xbb\xbfone\r\ntwo\r\n", b"M\xe4dchen", b"", b"\x00\xff", "tab\tline\n\u2028Ü".encode()]


def tree(root):
    """All files but the journal's own."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and ".studio" not in path.parts}


def history(journal):
    """All entries, the newest first: what each was, and whether it is undone."""
    return [(entry.what, True) for entry in journal._undone] + [(entry.what, False) for entry in journal._made[::-1]]


def write(root, name, text):
    path = root / name
    before = path.read_bytes() if path.exists() else None
    return Write(name, before, text)


@pytest.mark.parametrize("before", [*ODD, None])
@pytest.mark.parametrize("after", [*ODD, None])
def test_undo_and_redo_restore_every_byte_after_a_restart(tmp_path, before, after):
    if before is not None:
        (tmp_path / "a.txt").write_bytes(before)
    old = tree(tmp_path)
    Journal(tmp_path).do("edit", [Write("a.txt", before, after)])
    new = tree(tmp_path)
    assert new == ({} if after is None else {"a.txt": after})
    assert Journal(tmp_path).undo().entry.what == "edit"
    assert tree(tmp_path) == old
    Journal(tmp_path).redo()
    assert tree(tmp_path) == new


def test_many_entries_are_undone_in_turn_and_a_new_change_ends_redo(tmp_path):
    journal, states = Journal(tmp_path), [tree(tmp_path)]
    for i in range(5):
        journal.do(f"edit {i}", [write(tmp_path, "a.txt", b"%d" % i), write(tmp_path, f"{i}.txt", b"x")])
        states.append(tree(tmp_path))
    for i in (4, 3, 2):
        assert journal.undo().entry.what == f"edit {i}" and tree(tmp_path) == states[i]
    assert Journal(tmp_path).redo().entry.what == "edit 2" and tree(tmp_path) == states[3]
    journal.do("another", [write(tmp_path, "a.txt", b"new")])  # it has seen the other one's redo
    assert journal.redo() is None and Journal(tmp_path).next_redo() is None
    assert [what for what, _ in history(journal)[:3]] == ["another", "edit 2", "edit 1"]
    while journal.undo():
        pass
    assert tree(tmp_path) == states[0] == {}


def test_moves_go_there_and_back_and_leave_no_empty_folder(tmp_path):
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_text(name)
    journal, old = Journal(tmp_path), tree(tmp_path)
    journal.do("move", [Move("a.png", "5_new/deep/a.png"), Move("a.txt", "5_new/deep/a.txt")])
    assert tree(tmp_path) == {"5_new/deep/a.png": b"a.png", "5_new/deep/a.txt": b"a.txt"}
    journal.undo()
    assert tree(tmp_path) == old and not (tmp_path / "5_new").exists()
    journal.redo()
    assert (tmp_path / "5_new" / "deep" / "a.png").exists()


def test_nothing_is_moved_onto_another_file(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text(name)
    with pytest.raises(Changed, match="b.png is there already"):
        Journal(tmp_path).do("move", [Move("a.png", "b.png")])
    assert tree(tmp_path) == {"a.png": b"a.png", "b.png": b"b.png"}


@pytest.mark.parametrize("second", [Move("b.png", "c.png"), Write("c.png", None, b"x")])
def test_two_changes_that_end_in_one_file_are_refused_whole(tmp_path, second):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text(name)
    with pytest.raises(UserError, match="two of the files would be called c.png; nothing was changed"):
        Journal(tmp_path).do("move", [Move("a.png", "c.png"), second])
    assert tree(tmp_path) == {"a.png": b"a.png", "b.png": b"b.png"} and Journal(tmp_path).next_undo() is None


def test_a_change_of_what_nobody_saw_is_refused_whole(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"theirs")
    with pytest.raises(Changed) as refused:
        Journal(tmp_path).do("edit", [Write("a.txt", None, b"1"), Write("b.txt", b"seen", b"2")])
    assert refused.value.files == [("b.txt", "it was changed outside since")]
    assert tree(tmp_path) == {"b.txt": b"theirs"} and Journal(tmp_path).next_undo() is None


def test_undo_says_what_others_changed_and_can_leave_that_as_it_is(tmp_path):
    journal = Journal(tmp_path)
    journal.do("first", [write(tmp_path, f"{i}.txt", b"1") for i in range(3)])
    (tmp_path / "1.txt").write_bytes(b"theirs")
    with pytest.raises(Changed, match="1.txt: it was changed outside since"):
        journal.undo()
    assert tree(tmp_path) == {"0.txt": b"1", "1.txt": b"theirs", "2.txt": b"1"}
    journal.undo(skip_changed=True)
    assert tree(tmp_path) == {"1.txt": b"theirs"}
    Journal(tmp_path).redo()
    assert tree(tmp_path) == {"0.txt": b"1", "1.txt": b"theirs", "2.txt": b"1"}
    (tmp_path / "1.txt").write_bytes(b"1")  # what was left out once is nobody's to undo any more
    Journal(tmp_path).undo()
    assert tree(tmp_path) == {"1.txt": b"1"}


def test_an_intention_without_end_is_carried_out_by_the_next_who_opens(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"old")
    journal = Journal(tmp_path)
    journal.do("edit", [Write("a.txt", None, b"1"), Write("b.txt", b"old", b"2")])
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(lines[:-1]) + b'{"kind":"e')  # killed before the end was written
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_bytes(b"old")
    (tmp_path / ".b.txt.abcd1234").write_bytes(b"ha")
    again = Journal(tmp_path)
    assert tree(tmp_path) == {"a.txt": b"1", "b.txt": b"2"}
    assert again.note == "an interrupted change was completed: edit"
    again.undo()
    assert tree(tmp_path) == {"b.txt": b"old"} and Journal(tmp_path).note == ""


def test_a_change_that_fails_half_way_is_taken_back(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("a")
    journal, replace = Journal(tmp_path), os.replace

    def fail(source, target):
        if str(target).endswith("2.txt"):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="2.txt: No space left on device; nothing was changed"):
        journal.do("edit", [Move("a.png", "new/a.png"), *(Write(f"{i}.txt", None, b"x") for i in range(4))])
    assert tree(tmp_path) == {"a.png": b"a"} and journal.next_undo() is None
    assert Journal(tmp_path).next_undo() is None and Journal(tmp_path).note == ""


def test_damaged_lines_cost_their_own_entry_only(tmp_path):
    journal = Journal(tmp_path)
    for i in range(3):
        journal.do(f"edit {i}", [write(tmp_path, f"{i}.txt", b"some text")])
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"some", b"s\x00\x00e")
    journal.path.write_bytes(b"".join(lines) + b"no journal\n[]\n")
    again = Journal(tmp_path)
    assert [what for what, _ in history(again)] == ["edit 2", "edit 0"]
    again.undo(), again.undo()
    assert tree(tmp_path) == {"1.txt": b"some text"}


def test_a_long_journal_forgets_the_oldest_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "LIMIT", 4000)
    journal = Journal(tmp_path)
    for i in range(30):
        journal.do(f"edit {i}", [write(tmp_path, "a.txt", b"%d" % i * 100)])
    journal.undo(), journal.undo()
    before = history(journal)
    journal._compact()
    assert journal.path.stat().st_size < 4000
    after = history(journal)
    assert set(after) < set(before) and after == [row for row in before if row in after]
    assert journal.redo().entry.what == "edit 28" and journal.redo().entry.what == "edit 29"
    kept = 0
    while journal.undo():
        kept += 1
    assert 3 <= kept < 30 and tree(tmp_path) == {"a.txt": b"%d" % (29 - kept) * 100}


def test_a_change_larger_than_the_limit_is_undone_and_redone_with_those_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "LIMIT", 4000)
    journal, states = Journal(tmp_path), [tree(tmp_path)]
    for i, (name, size) in enumerate([("a", 10), ("b", 10), ("all", 9000), ("b", 10), ("a", 10)]):
        journal.do(f"edit {i}", [write(tmp_path, f"{name}.txt", b"%d" % i * size)])
        states.append(tree(tmp_path))
    for i in (4, 3, 2, 1, 0):
        assert Journal(tmp_path).undo().entry.what == f"edit {i}" and tree(tmp_path) == states[i]
    for i in range(5):
        assert Journal(tmp_path).redo().entry.what == f"edit {i}" and tree(tmp_path) == states[i + 1]
    with journal.held():
        kept = journal.path.stat()
    with journal.held():  # what is beyond the limit is not written anew at each change
        assert journal.path.stat().st_ino == kept.st_ino


def test_two_journals_of_one_folder_see_each_other(tmp_path):
    one, two = Journal(tmp_path), Journal(tmp_path)
    one.do("by one", [Write("a.txt", None, b"1")])
    two.do("by two", [Write("a.txt", b"1", b"2")])
    assert one.undo().entry.what == "by two" and two.undo().entry.what == "by one"
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["../out.txt", "/etc/x", "link/x.txt", "", "."])
def test_nothing_outside_the_data_set_is_touched(tmp_path, name):
    root = tmp_path / "set"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    for change in (Write(name, None, b"x"), Move(name, "a"), Move("a", name)):
        with pytest.raises(UserError):
            Journal(root).do("edit", [change])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written .*; copy the data set into the workspace"):
        Journal(tmp_path).do("edit", [Write("a.txt", None, b"x")])
    tmp_path.chmod(0o700)


def test_a_person_can_read_the_journal(tmp_path):
    Journal(tmp_path).do("edit", [Write("a.txt", None, "Mädchen".encode())])
    line = (tmp_path / ".studio" / "journal.jsonl").read_text("utf-8").splitlines()[0]
    assert json.loads(line.split("\t")[1]) == [["write", "a.txt", None, "Mädchen"]]
