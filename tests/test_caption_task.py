"""A task's settings are checked like a preset's, and its folder can be read by anyone at any time."""

import pytest

from trainer.caption import task as tasks
from trainer.caption.task import Task
from trainer.errors import UserError
from trainer.events import EventWriter


def settings(tmp_path, **changed):
    return tasks.parse({"folder": str(tmp_path), "model": "someone/model", **changed})


def test_all_faults_are_told_at_once_in_plain_words():
    with pytest.raises(UserError) as error:
        tasks.parse({"model": "m", "threshold": 3, "mode": "apend", "batchsize": 2, "preview": True})
    assert str(error.value).splitlines() == [
        "captioning.folder: is missing. Folder with the images; sub-folders count too.",
        "captioning.mode: should be 'missing', 'replace' or 'append', not 'apend'. Did you mean append?",
        "captioning.preview: should not be true or false",
        "captioning.threshold: should be less than or equal to 1, not 3.",
        "captioning.batchsize: no such key. Did you mean batch_size?",
    ]


def test_tasks_are_numbered_and_listed_newest_first(tmp_path):
    made = [tasks.create(tmp_path, settings(tmp_path, prefix=str(number))) for number in range(3)]
    assert [task.name for task in made] == ["0001", "0002", "0003"]
    assert [task.settings().prefix for task in tasks.list_tasks(tmp_path)] == ["2", "1", "0"]


def test_paths_are_written_out_whole(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "tagger").mkdir()
    monkeypatch.chdir(tmp_path)
    made = tasks.create(tmp_path, tasks.parse({"folder": "images", "model": "tagger"})).settings()
    assert (made.folder, made.model) == (str(tmp_path / "images"), str(tmp_path / "tagger"))
    assert tasks.create(tmp_path, settings(tmp_path)).settings().model == "someone/model"


def test_a_folder_of_something_else_is_no_task(tmp_path):
    with pytest.raises(UserError, match="not a captioning task"):
        Task(tmp_path).settings()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="not a captioning task"):
        Task(tmp_path).settings()


@pytest.mark.parametrize(("events", "word", "text"), [
    ([], "starting", "starting"),
    ([("start", {"name": "looking for images"})], "crashed", "ended without a word"),
    ([("progress", {"done": 2, "of": 9})], "crashed", "ended without a word"),
    ([("end", {"reason": "done", "done": 9, "of": 9})], "done", "done: 9 of 9 images"),
    ([("end", {"reason": "stopped", "done": 2, "of": 9})], "stopped", "stopped: 2 of 9 images"),
    ([("end", {"reason": "error", "error": "no such model"})], "failed", "no such model"),
])
def test_the_state_of_a_task_that_nobody_works_on(tmp_path, events, word, text):
    task = tasks.create(tmp_path, settings(tmp_path))
    writer = EventWriter(task.events)
    for kind, fields in events:
        writer.write(kind, **fields)
    state = task.state()
    assert state.word == word and state.text.startswith(text) and not state.alive


@pytest.mark.parametrize(("kind", "fields", "word", "text"), [
    ("start", {"name": "looking for images"}, "starting", "looking for images"),
    ("phase", {"name": "loading the model"}, "starting", "loading the model"),
    ("waiting", {}, "waiting", "waiting for the GPU, which another run is using"),
    ("progress", {"done": 2, "of": 9}, "working", "2 of 9 images"),
])
def test_the_state_of_a_task_at_work(tmp_path, kind, fields, word, text):
    task = tasks.create(tmp_path, settings(tmp_path))
    EventWriter(task.events).write(kind, **fields)
    with task.hold():
        assert (task.state().word, task.state().text, task.state().alive) == (word, text, True)
