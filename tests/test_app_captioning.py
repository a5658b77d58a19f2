"""The app starts the captioner beside itself, follows it by its files, and hands results to the data set's journal."""

import shutil
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from app.captioning import CAPTIONER, MODELS, Captioning, as_rows
from app.datasets.library import Library
from app.paths import Places
from tests import models_caption
from trainer.caption import task as tasks
from trainer.errors import UserError
from trainer.events import EventWriter


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        Image.new("RGB", (20, 20), "red").save(images / f"{number}.png")
    return images


def follow(captioning: Captioning, name: str, until: tuple[str, ...]) -> str:
    end = time.monotonic() + 60
    while (word := captioning.progress(name).word) not in until:
        assert time.monotonic() < end, f"waited in vain, {word}"
        time.sleep(0.02)
    return word


def test_a_task_runs_beside_the_app_and_its_results_become_one_entry(tmp_path, folder):
    captioning = Captioning(Places(tmp_path))
    name = captioning.start(folder, {"model": str(models_caption.tagger(tmp_path / "tagger")), "preview": 5})
    assert captioning.progress(name).alive
    with pytest.raises(UserError, match="are being written already"):
        captioning.start(folder, {"model": "someone/model"})
    assert follow(captioning, name, ("done", "failed")) == "done", captioning.progress(name).text
    assert captioning.progress(name).done == 5 and not captioning.progress(name).alive
    assert as_rows(captioning.results(name, 4)) == [{"image": "4.png", "before": "", "after": "red circle, blue sky"}]
    assert Captioning(Places(tmp_path)).latest(folder) == name  # after a restart of the app
    library = Library(Places(tmp_path, roots=(folder,)))
    try:
        other = library.open(library.create("other")["id"])
        for number in range(6):
            shutil.copy(folder / f"{number}.png", other.root)
        with pytest.raises(UserError, match="proposed for the images in .*images, and not for those in .*other; open"):
            captioning.apply(name, other)
        assert not list(other.root.glob("*.txt"))
        data_set = library.open(library.list_sets()["roots"][0]["id"])
        data_set.save_caption("1.png", "by hand", data_set.records(["1.png"])[0].version)
        answer = captioning.apply(name, data_set, ["0.png", "1.png", "2.png"])
        text = "red circle, blue sky"
        assert answer["changed"] == 2 and answer["undo"] == "Automatic captions"
        assert answer["skipped"] == [("1.png", "its caption was changed since")]
        assert [(folder / f"{number}.txt").read_text() for number in range(3)] == [text, "by hand", text]
        data_set.undo()
        assert not (folder / "0.txt").exists() and not (folder / "2.txt").exists()
        assert captioning.apply(name, data_set)["changed"] == 4
    finally:
        library.close()
    captioning.dismiss(name)
    assert captioning.latest(folder) is None
    with pytest.raises(UserError, match="no captioning task"):
        captioning.results(name)


def test_a_stop_and_a_captioner_that_dies_at_once(tmp_path, folder):
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from pathlib import Path\nfrom trainer.caption.task import Task\nfrom trainer.events import EventWriter\n"
        "task = Task(Path(sys.argv[2]))\n"
        "with task.hold():\n    events = EventWriter(task.events)\n    events.write('progress', done=1, of=9)\n"
        "    while task.take('stop') is None:\n        time.sleep(0.01)\n"
        "    events.write('end', reason='stopped', done=1, of=9)\n")
    captioning = Captioning(Places(tmp_path), (sys.executable, str(slow)))
    name = captioning.start(folder, {"model": "someone/model"})
    follow(captioning, name, ("working",))
    with pytest.raises(UserError, match="still at work"):
        captioning.dismiss(name)
    captioning.cancel(name)
    assert follow(captioning, name, ("stopped", "failed")) == "stopped"
    dead = Captioning(Places(tmp_path), (sys.executable, "-c", "import sys; sys.exit('no such thing')"))
    name = dead.start(folder, {"model": "someone/model"})
    assert follow(dead, name, ("failed",)) == "failed" and dead.progress(name).text == "no such thing"


def test_settings_are_checked_before_anything_starts(tmp_path, folder):
    with pytest.raises(UserError, match="captioning.mode: should be"):
        Captioning(Places(tmp_path)).start(folder, {"model": "m", "mode": "some"})
    assert not (tmp_path / "captioning").exists()


def test_the_form_has_every_setting_but_the_data_sets_own(tmp_path):
    described = {field["key"]: field for field in Captioning(Places(tmp_path)).describe()}
    assert set(described) == set(tasks.Settings.model_fields) - {"folder", "images"}
    assert described["mode"]["choices"] == ["missing", "replace", "append"] and not described["mode"]["advanced"]
    assert described["max_tokens"]["advanced"] and described["threshold"]["max"] == 1.0


def test_skipped_images_are_told(tmp_path, folder):
    task = tasks.create(tmp_path, tasks.parse({"folder": str(folder), "model": "m/n"}))
    EventWriter(task.events).write("skipped", file="0.png", reason="broken")
    assert Captioning(Places(tmp_path)).progress(task.name).skipped == [{"file": "0.png", "reason": "broken"}]


def test_the_command_is_the_one_that_a_person_types_and_models_say_what_they_need():
    assert CAPTIONER == (sys.executable, "-m", "trainer.caption")
    assert all(set(model) == {"id", "label", "instruction", "needs"} for model in MODELS)
