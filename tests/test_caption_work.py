"""A captioning task works through its images in any mode, can be stopped and killed, and says what went wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import models_caption
from trainer.caption import task as tasks
from trainer.caption import work
from trainer.caption.task import Task
from trainer.errors import UserError
from trainer.events import EventReader, EventWriter

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Path:
    return models_caption.tagger(tmp_path_factory.mktemp("tagger"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Red, green and blue; green has a caption, and lies in a sub-folder."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("sub/b.jpg", "lime"), ("z.webp", "blue")):
        Image.new("RGB", (20, 20), colour).save(images / name, quality=100)
    (images / "sub" / "b.txt").write_text("two\nlines, long hair")
    return images


def begin(folder: Path, model: Path | str, **settings: object) -> Task:
    checked = tasks.parse({"folder": str(folder), "model": str(model), **settings})
    return tasks.create(folder.parent / "workspace", checked)


def propose(folder: Path, model: Path | str, **settings: object) -> dict[str, str]:
    task = begin(folder, model, **settings)
    assert work.run(task, folder.parent / "workspace") == "done"
    return {item.image: item.after for item in task.suggestions()}


@pytest.mark.parametrize(("settings", "proposed"), [
    ({}, {"a.png": "red circle, blue sky", "z.webp": "^_^"}),
    ({"mode": "replace"}, {"a.png": "red circle, blue sky", "sub/b.jpg": "alice (story), long hair", "z.webp": "^_^"}),
    ({"mode": "append"}, {"a.png": "red circle, blue sky", "sub/b.jpg": "two\nlines, long hair, alice (story)",
                          "z.webp": "^_^"}),
    ({"prefix": "mystyle"}, {"a.png": "mystyle, red circle, blue sky", "z.webp": "mystyle, ^_^"}),
    ({"preview": 1}, {"a.png": "red circle, blue sky"}),
    ({"images": ["z.webp"]}, {"z.webp": "^_^"}),
    ({"images": ["sub/b.jpg"]}, {}),
    ({"batch_size": 1, "blacklist": ["red_circle"]}, {"a.png": "blue sky", "z.webp": "^_^"}),
])
def test_modes_prefix_preview_and_choice(folder, tagger, settings, proposed):
    assert propose(folder, tagger, **settings) == proposed


def test_nothing_is_written_to_the_data_set(folder, tagger):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    propose(folder, tagger, mode="replace")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_images_that_cannot_be_used_are_told_and_the_others_done(folder, tagger):
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "photo.heic").write_bytes(b"ftypheic")
    (folder / "foreign.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "foreign.txt").write_bytes("Käse".encode("latin-1"))
    Image.new("RGB", (20, 20)).save(folder / "dark.png")
    (folder / "a-masklabel.png").write_bytes((folder / "a.png").read_bytes())
    task = begin(folder, tagger)
    work.run(task, folder.parent)
    assert {item.image for item in task.suggestions()} == {"a.png", "z.webp"}
    reasons = {entry["file"]: entry["reason"] for entry in task.skipped()}
    assert set(reasons) == {"broken.png", "photo.heic", "foreign.png", "dark.png"}
    assert "not an image" in reasons["broken.png"] and "HEIC" in reasons["photo.heic"]
    assert "not UTF-8" in reasons["foreign.png"] and "threshold" in reasons["dark.png"]
    assert task.state().text == "done: 5 of 5 images"


def test_excluded_images_get_a_caption_only_when_named(folder, tagger):
    (folder / ".excluded").write_text("a.png\n")
    assert set(propose(folder, tagger)) == {"z.webp"}
    assert set(propose(folder, tagger, images=["a.png"])) == {"a.png"}


def test_transparency_is_white_and_exif_is_turned(folder, tagger):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(folder / "turned.jpg", exif=exif)
    assert propose(folder, tagger, images=["clear.png"])["clear.png"].startswith("alice")
    assert work._read(folder / "turned.jpg").size == (20, 40)


def test_large_images_are_made_smaller_for_the_model(folder):
    Image.new("L", (4000, 1000)).save(folder / "large.png")
    image = work._read(folder / "large.png")
    assert image.mode == "RGB" and abs(image.width * image.height - work.PIXELS) < 3000
    assert abs(image.width / image.height - 4) < 0.02


@pytest.mark.parametrize(("change", "message"), [
    ({"folder": "nowhere"}, "captioning.folder: .*nowhere is not there"),
    ({"model": "nowhere/at/all"}, "captioning.model: nowhere/at/all is not there. Give a folder, or a hub id"),
    ({"images": ["c.png"]}, "captioning.images: not in .*images: c.png"),
    ({"device": "cuda:77"}, "captioning.device = 'cuda:77': torch sees"),
])
def test_what_a_user_can_cause_ends_a_task_with_a_plain_message(folder, tagger, change, message):
    if "folder" in change:
        change = {"folder": str(folder / "nowhere")}
    task = tasks.create(folder.parent, tasks.parse({"folder": str(folder), "model": str(tagger), **change}))
    with pytest.raises(UserError, match=message):
        work.run(task, folder.parent)
    state = task.state()
    assert state.word == "failed" and not state.alive


def test_a_model_that_would_have_to_be_downloaded_says_so_without_a_network(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    task = begin(folder, "someone/captioner")
    with pytest.raises(UserError, match="someone/captioner is not on this machine, and the hub cannot be reached"):
        work.run(task, folder.parent)
    assert "local folder" in task.state().text


class Short:
    """A captioner whose GPU has room for one or two images."""

    tags = False

    def __init__(self, room: int) -> None:
        self.room, self.batches = room, []

    def caption(self, images):
        if len(images) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(images))
        return [f"{image.width} wide" for image in images]


def some_work(folder: Path, count: int) -> list[work.Work]:
    for number in range(count):
        Image.new("RGB", (10 + number, 10)).save(folder / f"n{number:02d}.png")
    return [work.Work(folder / f"n{number:02d}.png", str(number), "") for number in range(count)]


def test_a_batch_that_does_not_fit_is_halved_and_no_image_is_lost(tmp_path):
    captioner, events = Short(2), EventWriter(tmp_path / "events")
    said = list(work.ask(captioner, some_work(tmp_path, 11), 8, events, lambda: None))
    assert [text for _, text in said] == [f"{10 + number} wide" for number in range(11)]
    assert captioner.batches == [2, 2, 2, 2, 2, 1]
    assert [event["text"][-25:] for event in EventReader(tmp_path / "events").read()] == [
        "going on with 4 at a time", "going on with 2 at a time"]


def test_one_image_that_does_not_fit_ends_the_task_with_what_to_do(tmp_path):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(work.ask(Short(0), some_work(tmp_path, 3), 2, EventWriter(tmp_path / "events"), lambda: None))
    assert "choose a smaller model" in str(work._as_user_error(torch.cuda.OutOfMemoryError("x")))


def test_a_stop_keeps_what_was_done(folder, tagger):
    some_work(folder, 30)
    task = begin(folder, tagger, batch_size=1, threshold=0.0)
    with task.hold():  # a request from before is of another time
        pass
    guard_after = 5

    class Impatient(EventWriter):
        def write(self, kind: str, **fields: object) -> None:
            super().write(kind, **fields)
            if kind == "progress" and fields["done"] == guard_after:
                task.request("stop")

    original, work.EventWriter = work.EventWriter, Impatient
    try:
        assert work.run(task, folder.parent) == "stopped"
    finally:
        work.EventWriter = original
    assert len(task.suggestions()) == guard_after
    assert task.state().word == "stopped" and task.state().text == "stopped: 5 of 32 images"


def test_a_killed_task_is_crashed_and_its_results_can_be_read(folder, tagger):
    some_work(folder, 400)
    task = begin(folder, tagger, batch_size=1, threshold=0.0)
    process = subprocess.Popen([sys.executable, "-m", "trainer.caption", "--task", str(task.path)], cwd=ROOT)
    end = time.monotonic() + 60
    while len(task.suggestions()) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert task.is_held() and task.state().word == "working"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    state, done = task.state(), task.suggestions()
    assert state.word == "crashed" and "captioner.log" in state.text
    assert 3 <= len(done) < 402 and all(item.after for item in done)
    with open(task.results, "ab") as file:
        file.write(b'{"t":1,"kind":"caption","ima')
    assert task.suggestions() == done


def test_two_processes_never_work_on_one_task(folder, tagger):
    task = begin(folder, tagger)
    with task.hold(), pytest.raises(UserError, match="is being worked on by another process"):
        with Task(task.path).hold(patience=0.1):
            pass
