"""Trying LoRAs out from the app: what the page begins with, which process draws, and who may ask for what."""

import shutil
import sys
import time

import pytest

from app.bases import Bases
from app.exporting import Exporting
from app.paths import Places
from app.tabs import export_try
from app.trying import Trying
from tests.family_runs import MAKERS
from tests.test_tryout_bench import lora
from trainer import run as runs
from trainer.errors import UserError
from trainer.tryout import task

ASLEEP = (sys.executable, "-c", "import time; time.sleep(30)")
PRESET = """[model]
family = "sd15"
base = "{base}"
[data]
folder = "d"
[train]
steps = 3
[sample]
prompts = ["a red circle"]
steps = 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = MAKERS["sd15"](folder / "sd15")
    MAKERS["sdxl"](folder / "sdxl")
    return folder, lora(folder / "a.safetensors", base, "sd15")


@pytest.fixture
def trying(made, tmp_path):
    """A workspace with a run on a base, and the same base and another below a root."""
    folder, file = made
    places = Places(tmp_path / "w", (folder,))
    run = runs.create(places.workspace, "cats", PRESET.format(base=(folder / "sd15").as_posix()))
    shutil.copy(file, run.result)
    made = Trying(places, Exporting(places), Bases(places), ASLEEP)
    yield made
    for launch in made._launches.values():
        launch.process.kill()
        launch.process.wait()


RUN = "run:cats/cats.safetensors"


def test_a_runs_file_begins_with_its_base_and_its_first_prompt(trying):
    about = trying.about(RUN)
    assert (about["base"], about["prompt"], about["steps"], about["guidance"]) == ("run:cats", "a red circle", 2, 5.0)
    assert {row["family"] for row in about["bases"]} == {"sd15"} and about["family_name"] == "SD 1.5"


def test_any_other_file_has_a_base_only_where_something_tells(trying):
    about = trying.about("0:a.safetensors")
    assert about["base"] == "" and len(about["bases"]) > 1 and about["prompt"] == "" and about["guidance"] is None


def test_the_same_base_is_drawn_with_by_the_same_process(trying):
    first = trying.ask(RUN, "run:cats", {"prompt": "x"})
    assert trying.ask(RUN, "run:cats", {"prompt": "x", "strength": 0.5}) == {"task": first["task"], "request": 2}
    assert trying.read(first["task"], 2)["word"] == "starting"
    other = trying.ask(RUN, "demo:base", {"prompt": "x"})
    tasks = {found.name: found for found in task.list_tasks(trying.places.workspace)}
    assert other["task"] != first["task"] and tasks[first["task"]].asked("stop")
    assert not tasks[other["task"]].asked("stop")
    trying.close()
    assert tasks[other["task"]].asked("stop")


def test_a_process_that_cannot_begin_is_told(trying):
    trying._command = (sys.executable, "-c", "print('no torch here'); raise SystemExit(1)")
    asked = trying.ask(RUN, "run:cats", {"prompt": "x"})
    end = time.monotonic() + 20
    while (answer := trying.read(**{"name": asked["task"], "request": 1}))["word"] == "starting":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert answer == {"word": "failed", "text": "no torch here"}


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_process_that_is_killed_while_it_draws_is_told(trying):
    program = """if True:  # it is there before the request is
        import pathlib, sys, time
        folder = pathlib.Path(sys.argv[-1])
        (folder / "events.jsonl").write_text('{"kind": "phase", "request": 1, "name": "x"}\\n')
        while not (asked := list((folder / "control").glob("draw-*.json"))):
            time.sleep(0.01)
        asked[0].unlink()
        time.sleep(30)
    """
    trying._command = (sys.executable, "-c", program)
    asked = trying.ask(RUN, "run:cats", {"prompt": "x"})
    [found], end = task.list_tasks(trying.places.workspace), time.monotonic() + 60
    while found.newer_waits():
        assert time.monotonic() < end
        time.sleep(0.05)
    process = trying._launches[asked["task"]].process
    process.kill()
    process.wait()
    answer = trying.read(asked["task"], 1)
    assert answer["word"] == "failed" and "broke off (code -9); perhaps the machine ran out of memory" in answer["text"]


def test_a_base_of_another_family_is_refused_before_anything_is_loaded(trying):
    rows = trying._bases.listing()["bases"]
    sdxl = next(row["id"] for row in rows if row["family"] == "sdxl")
    with pytest.raises(UserError, match="this LoRA is for SD 1.5, and the base model is SDXL"):
        trying.ask(RUN, sdxl, {"prompt": "x"})
    assert task.list_tasks(trying.places.workspace) == []


@pytest.mark.parametrize(("name", "asked"), [
    ("about_try", {"id": "run:cats/preset.toml"}),
    ("draw_try", {"id": RUN, "base": "run:cats", "prompt": "x" * 20_000}),
    ("draw_try", {"id": RUN, "base": "/etc", "prompt": "x"}), ("draw_try", {"id": "0:../x", "base": "run:cats",
                                                                            "prompt": "x"}),
    ("draw_try", {"id": RUN, "base": "run:cats", "prompt": "x", "strength": 99.0}),
    ("draw_try", {"id": RUN, "base": "run:cats", "prompt": "x", "device": "cuda"}),
    ("read_try", {"task": "0001", "request": 1}), ("read_try", {"task": "../1", "request": 1}),
    ("stop_try", {"task": "0007"})])
def test_hostile_requests_are_refused(trying, name, asked):
    functions = {function.__name__: function for function in export_try.functions(trying)}
    assert set(functions[name](asked)) == {"error"}
    assert task.list_tasks(trying.places.workspace) == []
