"""`python -m trainer.caption`: options from the settings, a plan, and captions written when asked."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import models_caption
from trainer.caption import task as tasks
from trainer.caption.__main__ import _write, main
from trainer.caption.task import Suggestion


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "images" / f"{name}.png")
    models_caption.tagger(tmp_path / "tagger")
    return tmp_path / "images"


def call(folder: Path, *more: object) -> int:
    return main([str(item) for item in ("--folder", folder, "--model", folder.parent / "tagger", "--workspace",
                                        folder.parent / "workspace", *more)])


def test_a_preview_is_printed_and_nothing_is_written(folder, capsys):
    assert call(folder, "--preview", 1, "--prefix", "mine") == 0
    out = capsys.readouterr()
    assert out.out == "a.png\n  - \n  + mine, red circle, blue sky\n"
    assert "done: 1 captions proposed; --write puts them beside the images" in out.err
    assert not list(folder.glob("*.txt"))


def test_captions_are_written_when_asked(folder, capsys):
    assert call(folder, "--write", "--blacklist", "blue sky", "^_^") == 0
    assert (folder / "a.txt").read_text() == "red circle" and not (folder / "b.txt").exists()
    assert "1 captions proposed, 1 written" in capsys.readouterr().err


def test_a_plan_holds_before_and_after(folder, tmp_path):
    (folder / "b.txt").write_text("blue")
    assert call(folder, "--out", tmp_path / "plan.json", "--mode", "append") == 0
    assert json.loads((tmp_path / "plan.json").read_text()) == [
        {"image": "a.png", "before": "", "after": "red circle, blue sky"},
        {"image": "b.png", "before": "blue", "after": "blue, ^_^"}]


def test_a_task_that_is_written_down_is_worked_through(folder, tmp_path):
    task = tasks.create(tmp_path / "workspace", tasks.parse({"folder": str(folder), "model": str(tmp_path / "tagger")}))
    assert main(["--task", str(task.path)]) == 0
    assert [item.image for item in task.suggestions()] == ["a.png", "b.png"]


@pytest.mark.parametrize(("more", "message"), [
    (("--threshold", "2"), "captioning.threshold: should be less than or equal to 1, not '2'"),
    (("--mode", "all"), "captioning.mode: should be"),
    (("--speed", "1"), "unrecognized arguments: --speed 1"),
    (("--task", "x"), "--task has its own settings; leave out --folder, --model"),
])
def test_wrong_options_are_a_users_error(folder, capsys, more, message):
    assert call(folder, *more) == 1
    assert message in capsys.readouterr().err


def test_a_caption_that_changed_meanwhile_is_kept(folder, capsys):
    (folder / "a.txt").write_text("by hand")
    assert _write(folder, [Suggestion("a.png", "", "by machine"), Suggestion("b.png", "", "sea")]) == 1
    assert (folder / "a.txt").read_text() == "by hand" and (folder / "b.txt").read_text() == "sea"
    assert "skipped a.png: its caption was changed meanwhile" in capsys.readouterr().err
