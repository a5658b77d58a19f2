"""The process that tries LoRAs out: the newest request is drawn, the rest told, and it ends by itself."""

from contextlib import contextmanager

import pytest
from PIL import Image

from tests.family_runs import MAKERS
from tests.test_tryout_bench import lora
from trainer.events import EventReader
from trainer.tryout import work
from trainer.tryout.task import Draw, Settings, create, list_tasks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = MAKERS["sd15"](folder / "base")
    return base, lora(folder / "a.safetensors", base, "sd15")


@pytest.fixture
def task(files, tmp_path):
    return create(tmp_path, Settings(family="sd15", base=str(files[0]), device="cpu", idle_minutes=0.005))


def draw(files, **changes):
    return Draw(**{"file": str(files[1]), "prompt": "a circle", "steps": 2} | changes)


def kinds(task, kind):
    return [event for event in EventReader(task.events).read() if event["kind"] == kind]


def test_only_the_newest_request_is_drawn_with_and_without(files, task, tmp_path):
    numbers = [task.ask(draw(files, strength=strength, without=True)) for strength in (0.2, 0.4, 0.9)]
    assert task.state(numbers[-1]).word == "starting"
    work.serve(task, tmp_path)
    state = task.state(numbers[-1])
    assert (state.word, dict(state.pictures)) == ("done", {"with": "000003.png", "without": "000003-base.png"})
    assert task.state(numbers[0]).word == "ended"
    with Image.open(task.pictures / "000003.png") as picture:
        assert '"strength": 0.9' in picture.info["parameters"] and picture.size == (64, 64)
    assert [event["name"] for event in kinds(task, "phase")][-1] == "drawing without it"
    assert kinds(task, "end")[0]["reason"] == "idle" and not task.is_held()


def test_the_bases_picture_is_drawn_once_for_all_strengths(files, task, tmp_path, monkeypatch):
    answered = work.Desk._answer

    def answer(desk, number, values):
        answered(desk, number, values)
        if number < 3:
            task.ask(draw(files, strength=number / 10, without=True, seed=1 if number == 1 else 2))

    monkeypatch.setattr(work.Desk, "_answer", answer)
    task.ask(draw(files, without=True))
    work.serve(task, tmp_path)
    pictures = [task.state(number).pictures["without"] for number in (1, 2, 3)]
    assert pictures == ["000001-base.png", "000001-base.png", "000003-base.png"]


def test_a_newer_request_ends_the_one_that_is_being_drawn(files, task, tmp_path, monkeypatch):
    told = work.Desk._tell

    def tell(desk, name, done, of):
        if name == "drawing with the LoRA" and desk._number == 1 and done == 1:
            task.ask(draw(files, strength=0.5))
        told(desk, name, done, of)

    monkeypatch.setattr(work.Desk, "_tell", tell)
    task.ask(draw(files))
    work.serve(task, tmp_path)
    assert (task.state(1).word, task.state(2).word) == ("ended", "done")


def test_what_is_wrong_is_told_and_the_next_request_is_drawn(files, task, tmp_path, monkeypatch):
    answered = work.Desk._answer

    def answer(desk, number, values):
        answered(desk, number, values)
        if number == 1:
            task.ask(draw(files))

    monkeypatch.setattr(work.Desk, "_answer", answer)
    task.ask(draw(files, file=str(tmp_path / "none.safetensors")))
    work.serve(task, tmp_path)
    assert task.state(1).word == "failed" and "there is no file" in task.state(1).text
    assert task.state(2).word == "done"


def test_a_run_that_uses_the_gpu_is_waited_for_and_said(files, task, tmp_path, monkeypatch):
    said = []

    @contextmanager
    def turn(workspace, device, on_wait):
        on_wait()
        said.append(task.state(1))
        yield

    monkeypatch.setattr(work.gpu, "turn", turn)
    task.ask(draw(files))
    work.serve(task, tmp_path)
    assert said[0].word == "waiting" and "a run is using the GPU" in said[0].text
    assert task.state(1).word == "done"


def test_the_gpu_is_given_back_after_a_while(files, task, tmp_path, monkeypatch):
    held, parked = [], []

    @contextmanager
    def turn(workspace, device, on_wait):
        held.append(True)
        yield
        held.pop()

    monkeypatch.setattr(work.gpu, "turn", turn)
    monkeypatch.setattr(work, "HELD_FOR", 0.0)
    monkeypatch.setattr(work.Bench, "park", lambda bench: parked.append(len(held)))
    taken = work.Desk._take_turn

    def take(desk, bench):
        taken(desk, bench)
        desk._has_turn = True  # as on a GPU

    monkeypatch.setattr(work.Desk, "_take_turn", take)
    task.ask(draw(files))
    work.serve(task, tmp_path)
    assert parked == [1] and held == []  # its memory went before its turn


def test_a_stop_ends_it_and_tells_the_request(files, task, tmp_path, monkeypatch):
    loaded = work.Bench.lora
    monkeypatch.setattr(work.Bench, "lora", lambda bench, path: (task.request("stop"), loaded(bench, path))[1])
    task.ask(draw(files))
    work.serve(task, tmp_path)
    assert task.state(1).word == "failed" and "put away" in task.state(1).text
    assert kinds(task, "end")[0]["reason"] == "stopped"


def test_old_folders_are_taken_away(files, tmp_path):
    for _ in range(6):
        create(tmp_path, Settings(family="sd15", base=str(files[0])))
    assert [task.name for task in list_tasks(tmp_path)] == ["0006", "0005", "0004", "0003"]
