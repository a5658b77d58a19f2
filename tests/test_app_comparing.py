"""What the tab "Compare" gets from the server: only what is new, in few points, and the table when it changed."""

import sys
import time
from pathlib import Path

import pytest

from app.comparing import Comparing
from app.components import Answer
from app.jobs import Jobs
from app.paths import Places
from app.tabs import compare
from tests.run_folders import PRESET, finished
from trainer import run as runs
from trainer.events import EventWriter
from trainer.queue import Queue

STAND_IN = (sys.executable, str(Path(__file__).parent / "app_trainer.py"))


@pytest.fixture
def comparing(tmp_path):
    return Comparing(Jobs(Places(tmp_path), STAND_IN))


def call(comparing, function, **request) -> Answer:
    made = {work.__name__: work for work in compare.functions(comparing.jobs, comparing)}
    return made[function](request)


def test_the_list_says_what_runs_are_chosen_by_and_comes_once(comparing, tmp_path):
    finished(tmp_path, "a", "adapter.rank=4", "train.seed=3", "train.lr=2e-4")
    listed = call(comparing, "list_compared")
    assert [[row[0], row[1], *row[3:]] for row in listed["runs"]] == [["a", "done", "stella", 4, 2e-4, 3]]
    assert call(comparing, "list_compared", seen=listed["tag"]) == {}


def test_first_all_then_only_what_came_then_all_again_after_a_resume(comparing, tmp_path):
    run = finished(tmp_path, "a", validation=0.3, steps=1000)
    finished(tmp_path, "b", "adapter.rank=4", validation=0.4)
    first = call(comparing, "read_compared", runs=["a", "b", "gone"])
    assert first["curves"]["a"]["reset"] and len(first["curves"]["a"]["loss"]["step"]) <= 300
    assert first["waiting"] == {"gone": "is not there any more"}
    assert [row["name"] for row in first["table"]["rows"]] == ["a", "b"]
    assert first["table"]["findings"][0][1] == "cannot be told"
    cursors = {name: found["cursor"] for name, found in first["curves"].items()}

    events = EventWriter(run.events)
    events.write("step", step=1001, steps=2000, loss=0.5)
    more = call(comparing, "read_compared", runs=["a", "b"], cursors=cursors, seen=first["tag"])
    assert more["curves"]["a"]["loss"] == {"step": [1001], "mean": [0.5], "n": [1]}
    assert "reset" not in more["curves"]["a"] and "loss" not in more["curves"]["b"]
    cursors["a"] = more["curves"]["a"]["cursor"]
    events.write("start", step=500, steps=2000)
    events.write("step", step=501, steps=2000, loss=0.5)
    again = call(comparing, "read_compared", runs=["a"], cursors=cursors)["curves"]["a"]
    assert again["reset"] and again["loss"]["step"][-1] == 501


def test_the_table_comes_only_when_it_is_another_one(comparing, tmp_path):
    finished(tmp_path, "a", validation=0.3)
    first = call(comparing, "read_compared", runs=["a"])
    assert "table" not in call(comparing, "read_compared", runs=["a"], seen=first["tag"])


def test_a_plan_is_told_before_anything_is_written_and_a_start_queues_it(comparing, tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/style.toml").write_text(PRESET)
    request = {"shelf": "own", "name": "style", "methods": ["lora", "stella"], "seeds": "0 1"}
    plan = call(comparing, "plan_sweep", **request)
    assert plan["shape"] == "4 runs: 2 methods × 2 seeds" and plan["name"] == "style-compared"
    assert not (tmp_path / "queue").exists() or not Queue(tmp_path).waiting()
    assert "rank 0: should be greater" in call(comparing, "plan_sweep", **request, ranks="0")["error"]
    assert "write whole numbers" in call(comparing, "plan_sweep", **request | {"seeds": "a"})["error"]
    assert "error" in call(comparing, "plan_sweep", **request | {"methods": ["best"]})
    assert "not a name inside" in call(comparing, "plan_sweep", **request | {"name": "../style"})["error"]
    with Queue(tmp_path).seat(""):  # so that nothing begins
        made = call(comparing, "start_sweep", **request)
        assert [entry.name for entry in Queue(tmp_path).waiting()] == made["runs"]
        told = call(comparing, "read_compared", runs=made["runs"])
        assert told["waiting"][made["runs"][1]] == "waits in the queue: place 2 of 4" and told["alive"]
    assert call(comparing, "list_compared")["comparisons"] == [["style-compared", "style", made["runs"]]]


def test_reports_and_cards_are_whole_pages_with_plain_file_names(comparing, tmp_path):
    finished(tmp_path, "a", validation=0.3)
    made = call(comparing, "make_report", runs=["a", "gone"], title="../My <b>")
    assert made["file"] == "-My -b-.html" and "<title>../My &lt;b&gt;</title>" in made["html"]
    assert call(comparing, "make_card", run="a")["file"] == "a.html"
    assert "has begun" in call(comparing, "make_report", runs=["gone"])["error"]
    assert "no run called" in call(comparing, "make_card", run="../a")["error"]


def test_fifty_runs_are_listed_in_a_moment(comparing, tmp_path):
    for number in range(50):
        ours = runs.create(tmp_path, f"run{number}", PRESET)
        events = EventWriter(ours.events)
        for step in range(1, 400):
            events.write("step", step=step, steps=400, loss=0.1, lr=1e-4, sec=0.5, eta=1.0)
        events.write("end", step=400, reason="done")
    taken = []
    for _ in range(5):
        fresh, begun = Comparing(Jobs(Places(tmp_path), STAND_IN)), time.perf_counter()
        assert len(fresh.listing("")["runs"]) == 50
        taken.append(time.perf_counter() - begun)
    print(f"50 runs: {min(taken) * 1000:.0f} ms")
    assert min(taken) < 0.2
