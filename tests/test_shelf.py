"""Runs get other names, go to the trash and come back."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests import run_folders
from trainer import facts, files, shelf, sweep
from trainer import preset as presets
from trainer.__main__ import main
from trainer.errors import UserError
from trainer.queue import Queue
from trainer.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = run_folders.finished(tmp_path, "cat", validation=0.3)
    for step in (50, 100):
        files.write_atomic(run.export_of(step), b"lora %d" % step)
    return run


def content(run: Run) -> dict[str, bytes]:
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in run.path.rglob("*")
            if path.is_file() and path.name != "lock"}


def test_a_renamed_runs_files_are_called_after_it(run, tmp_path) -> None:
    named = shelf.rename(tmp_path, run, "dog")
    assert not run.path.exists() and named.path == tmp_path / "runs" / "dog"
    assert sorted(path.name for path in named.path.rglob("*.safetensors")) == [
        "dog-000050.safetensors", "dog-000100.safetensors", "dog.safetensors"]
    assert named.export_of(50).read_bytes() == b"lora 50" and named.state().word == "done"
    assert [export.file for export in facts.collect(named).exports] == ["dog.safetensors"]  # its event says cat
    assert named.exported("exports/cat-000050.safetensors") == named.export_of(50)
    assert shelf.rename(tmp_path, named, "cat").result.read_bytes() == b"lora" * 1000


def test_a_renamed_run_stays_in_its_comparisons(run, tmp_path) -> None:
    told = {"name": "three", "made": 1.0, "preset": "demo", "runs": ["dog", "cat"]}
    files.write_atomic(tmp_path / "comparisons" / "three.json", json.dumps(told).encode())
    shelf.rename(tmp_path, run, "hen")
    assert [one.runs for one in sweep.listing(tmp_path)] == [["dog", "hen"]]


def test_a_rename_that_was_killed_after_the_folder_is_completed_later(run, tmp_path) -> None:
    os.rename(run.path, tmp_path / "runs" / "dog")
    half = Run(tmp_path / "runs" / "dog")
    assert not half.result.exists()
    assert shelf.rename(tmp_path, half, "dog").result.is_file()
    assert half.export_of(50).is_file() and len(list(half.path.rglob("*.safetensors"))) == 3


def test_files_that_are_there_already_are_never_replaced(run) -> None:
    (run.path / "other.safetensors").write_bytes(b"mine")
    files.write_atomic(run.exports / "other-000050.safetensors", b"mine too")
    before = content(run)
    shelf.settle(run)
    assert content(run) == before


def test_living_waiting_and_taken_are_refused_and_nothing_moves(run, tmp_path) -> None:
    run_folders.finished(tmp_path, "dog")
    before = content(run)
    acts = {"rename": lambda: shelf.rename(tmp_path, run, "new"), "delete": lambda: shelf.delete(tmp_path, run)}
    with run.hold():
        for act in acts.values():
            with pytest.raises(UserError, match="cat is being trained; stop it first"):
                act()
    entry = Queue(tmp_path).add(presets.load(run.preset), "hen")
    with pytest.raises(UserError, match="already a run called 'hen'"):
        shelf.rename(tmp_path, run, "hen")
    os.replace(entry.path, entry.path.with_name("0001-cat.toml"))
    for act in acts.values():
        with pytest.raises(UserError, match="cat is in the queue; take it out first"):
            act()
    Queue(tmp_path).cancel("cat")
    with pytest.raises(UserError, match="already a run called 'dog'"):
        shelf.rename(tmp_path, run, "dog")
    for name in ("../out", "", "con", "a/b"):
        with pytest.raises(UserError, match="cannot be a run's name"):
            shelf.rename(tmp_path, run, name)
    assert content(run) == before


def test_a_deleted_run_comes_back_as_it_was(run, tmp_path) -> None:
    before = content(run)
    entry = shelf.delete(tmp_path, run)
    assert not run.path.exists() and (tmp_path / "trash" / "runs" / entry / "preset.toml").is_file()
    (one,) = shelf.trash(tmp_path)
    assert (one.entry, one.name, one.bytes) == (entry, "cat", sum(map(len, before.values())))
    assert abs(one.deleted - time.time()) < 60
    assert content(shelf.restore(tmp_path, entry)) == before and shelf.trash(tmp_path) == []


def test_runs_of_one_name_lie_side_by_side_in_the_trash(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shelf.time, "strftime", lambda form: "20260102-030405")
    first = shelf.delete(tmp_path, run)
    second = shelf.delete(tmp_path, run_folders.finished(tmp_path, "cat"))
    assert [one.entry for one in shelf.trash(tmp_path)] == sorted([first, second], reverse=True) != [first, first]
    shelf.restore(tmp_path, second)
    with pytest.raises(UserError, match="already a run called 'cat'"):
        shelf.restore(tmp_path, first)
    assert [one.name for one in shelf.trash(tmp_path)] == ["cat"]


def test_only_what_is_in_the_trash_is_erased(run, tmp_path) -> None:
    entry = shelf.delete(tmp_path, run)
    kept = tmp_path / "trash" / "runs" / "mine"
    kept.mkdir()
    for wrong in ("../../runs", "mine", "cat", ""):
        with pytest.raises(UserError, match="is not in the trash any more"):
            shelf.erase(tmp_path, [entry, wrong])
    assert shelf.erase(tmp_path, [entry]) > 4000
    assert shelf.trash(tmp_path) == [] and kept.is_dir()


def test_the_verbs_say_what_they_did(run, tmp_path, capsys) -> None:
    def say(*words: str, code: int = 0) -> str:
        assert main([*words, "--workspace", str(tmp_path)]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    assert say("rename", "cat", "dog").startswith("cat is called dog now: ")
    assert "dog is in the trash now" in say("delete", "dog")
    assert say("restore").count("-dog") == 1
    assert say("restore", "dog").startswith("dog is back: ")
    assert json.loads(say("delete", "dog", "--json"))["trashed"] == "dog"
    assert "say which run" in say("delete", code=1)
    assert say("delete", "--forever").startswith("1 runs in the trash are erased; ")
    assert "no run called 'dog' is in the trash" in say("restore", "dog", code=1)
    run_folders.finished(tmp_path, "hen")
    assert say("delete", "hen", "--forever").startswith("hen is erased; ")
    assert say("restore") == "the trash has no runs\n" == say("delete", "--forever")
    outside = run_folders.finished(tmp_path, "owl").path.rename(tmp_path / "owl")
    assert "is not in the runs/ of a workspace" in say("delete", str(outside), code=1)
