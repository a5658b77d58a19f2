"""Trainers are started as at a shell, live on without the app, and answer to files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.jobs import TRAINER, Jobs
from app.paths import Places
from tests.measured_run import measured
from trainer import preset, run
from trainer.errors import UserError
from trainer.events import EventWriter

STAND_IN = (sys.executable, str(Path(__file__).parent / "app_trainer.py"))
PRESET = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = {steps}\n'


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path)


def preset_file(places, steps=5, folder="pictures"):
    file = places.workspace / "p.toml"
    file.write_text(PRESET.format(steps=steps).replace("pictures", folder))
    return file


def wait(what, seconds=30.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def state(jobs, name):
    return {row.name: row.state for row in jobs._list()}[name]


def test_the_command_is_the_one_that_a_person_types():
    assert TRAINER == (sys.executable, "-m", "trainer")


def test_a_run_goes_from_starting_to_done(places):
    jobs = Jobs(places, STAND_IN)
    jobs.start(preset_file(places), "a")
    assert state(jobs, "a").word == "starting"
    wait(lambda: state(jobs, "a").word == "done")
    assert places.run("a").result.exists() and not jobs.early_end("a")


def test_a_name_that_is_taken_or_being_taken_is_refused(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.05"))
    file = preset_file(places, steps=400)
    jobs.start(file, "a")
    with pytest.raises(UserError, match="already a run called 'a'"):
        jobs.start(file, "a")
    wait(lambda: state(jobs, "a").word == "training")
    with pytest.raises(UserError, match="already a run called 'a'"):
        Jobs(places, STAND_IN).start(file, "a")
    with pytest.raises(UserError, match="already being trained"):
        jobs.resume(places.run("a"))
    jobs.order(places.run("a"), "stop", [])
    wait(lambda: state(jobs, "a").word == "stopped")


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "con", "a" * 200, "-x", "a\n"])
def test_an_impossible_name_is_refused_before_anything_starts(places, name):
    with pytest.raises(UserError, match="cannot be a run's name"):
        Jobs(places, STAND_IN).start(preset_file(places), name)


def test_a_trainer_that_dies_at_once_leaves_its_message(places):
    jobs = Jobs(places, STAND_IN)
    jobs.start(preset_file(places, folder="missing"), "a")
    wait(lambda: state(jobs, "a").word == "failed")
    assert jobs.early_end("a").startswith("data.folder: missing") or "missing does not exist" in jobs.early_end("a")
    assert not (places.runs / "a").exists()
    jobs.start(preset_file(places), "a")  # the name is free again
    wait(lambda: state(jobs, "a").word == "done")


def test_pause_go_on_save_and_sample_go_by_file(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    jobs.start(preset_file(places, steps=2000), "a")
    wait(lambda: state(jobs, "a").word == "training")
    ours = places.run("a")
    jobs.order(ours, "pause", [])
    wait(lambda: state(jobs, "a").word == "paused")
    jobs.order(ours, "continue", [])
    wait(lambda: state(jobs, "a").word == "training")
    jobs.order(ours, "save", [])
    wait(lambda: list(ours.exports.glob("*.safetensors")))
    jobs.order(ours, "sample", ["my own prompt"])
    wait(lambda: "my own prompt" in ours.events.read_text())
    jobs.order(ours, "stop", [])
    wait(lambda: state(jobs, "a").word == "stopped")
    with pytest.raises(UserError, match="not being trained"):
        jobs.order(ours, "pause", [])


def test_a_killed_run_is_crashed_and_can_be_resumed(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    jobs.start(preset_file(places, steps=60), "a")
    ours = places.run("a") if wait(lambda: (places.runs / "a" / "preset.toml").exists()) else None
    wait(lambda: state(jobs, "a").step > 2)
    jobs.order(ours, "save", [])
    wait(lambda: ours.last_step())
    jobs._launches["a"].process.kill()
    jobs._launches["a"].process.wait()
    assert state(jobs, "a").word == "crashed"
    jobs.resume(ours)
    wait(lambda: state(jobs, "a").word == "done", 60)


def test_a_paused_run_that_was_killed_does_not_wait_after_its_resume(places):
    ours = run.create(places.workspace, "a", PRESET.format(steps=3))
    ours.request("pause")
    jobs = Jobs(places, STAND_IN)
    jobs.resume(ours)
    wait(lambda: state(jobs, "a").word == "done")


def test_a_trainer_outlives_the_app_and_its_terminal(places):
    """kill -9 of the app, Ctrl-C and hang-up of its whole process group: the trainer goes on."""
    file = preset_file(places, steps=100_000)
    program = ("import sys, time; from pathlib import Path; from app.jobs import Jobs; from app.paths import Places\n"
               f"Jobs(Places(Path({str(places.workspace)!r})), {(*STAND_IN, '--pace', '0.02')!r}).start("
               f"Path({str(file)!r}), 'a')\nprint('started', flush=True)\ntime.sleep(60)")
    app = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE,
                           start_new_session=True)
    assert app.stdout.readline() == b"started\n"
    wait(lambda: (places.runs / "a" / "events.jsonl").exists())
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
        if app.poll() is None:
            os.killpg(app.pid, number)
    app.wait()
    jobs = Jobs(places, STAND_IN)
    before = wait(lambda: state(jobs, "a").step)
    wait(lambda: state(jobs, "a").step > before)
    jobs.order(places.run("a"), "stop", [])
    wait(lambda: state(jobs, "a").word == "stopped")


@pytest.mark.timed
def test_fifty_runs_are_listed_in_a_fifth_of_a_second_newest_first(places):
    for number in range(50):
        ours = run.create(places.workspace, f"r{number:02d}", PRESET.format(steps=100))
        os.utime(ours.preset, (1000 + number, 1000 + number))
        events = EventWriter(ours.events)
        for step in range(1, 101):
            events.write("step", step=step, steps=100, loss=0.1, lr=1e-4, sec=1.0)
        events.write("end", step=100, reason="done")
    jobs = Jobs(places, STAND_IN)
    rows = jobs.listing()
    assert [row.name for row in rows] == [f"r{number:02d}" for number in reversed(range(50))]
    assert {row.state.word for row in rows} == {"done"}
    times = []
    for _ in range(3):  # the quickest counts: others may be using the machine
        begun = time.perf_counter()
        jobs._list()
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.2, times


def test_a_second_start_waits_and_begins_when_the_first_is_over(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    assert not jobs.start(preset_file(places, steps=10_000), "a")
    wait(lambda: state(jobs, "a").word == "training")
    assert jobs.start(preset_file(places, steps=3), "b") and jobs.start(preset_file(places, steps=4), "c")
    assert jobs.pending("c").text == "waits in the queue: place 2 of 2" and jobs.pending("d") is None
    with pytest.raises(UserError, match="already a run called 'b'"):
        jobs.start(preset_file(places), "b")
    jobs.order_queue("c", "up")
    assert [entry.name for entry in jobs.queue.waiting()] == ["c", "b"]
    jobs.order(places.run("a"), "stop", [])
    wait(lambda: (places.runs / "b").exists() and state(jobs, "b").word == "done")
    assert state(jobs, "a").word == "stopped" and state(jobs, "c").word == "done"
    assert places.run("c").events.stat().st_mtime <= places.run("b").events.stat().st_mtime
    wait(lambda: not jobs.queue.is_served())
    assert not jobs.start(preset_file(places), "d")  # nothing is on: at once
    wait(lambda: state(jobs, "d").word == "done")


def test_a_run_of_the_queue_that_is_stopped_in_the_app_stays_stopped(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    jobs.queue.add(preset.load(preset_file(places, steps=10_000)), "a")
    jobs.serve_queue()
    wait(lambda: (places.runs / "a").exists() and state(jobs, "a").word == "training")
    jobs.order(places.run("a"), "stop", [])
    wait(lambda: state(jobs, "a").word == "stopped")
    wait(lambda: not jobs.queue.is_served())
    assert jobs.queue.names() == set() and jobs.queue.failures() == []


def test_a_run_that_left_the_queue_and_has_no_preset_yet_stays_in_the_list(places):
    jobs = Jobs(places, STAND_IN)
    jobs.queue.add(preset.load(preset_file(places)), "a")
    with jobs.queue.claim():
        assert state(jobs, "a").word == "starting" and state(jobs, "a").alive
        (places.runs / "a").mkdir(parents=True)
        assert state(jobs, "a").word == "starting"
        (places.runs / "a" / "preset.toml").write_text(PRESET.format(steps=5))
        assert [row.name for row in jobs._list()] == ["a"]


def test_a_run_that_waits_after_a_failed_start_of_its_name_is_not_called_failed(places):
    jobs = Jobs(places, STAND_IN)
    jobs.start(preset_file(places, folder="missing"), "a")
    wait(lambda: state(jobs, "a").word == "failed")
    jobs.serve_queue = lambda: None  # it shall wait
    assert jobs.start(preset_file(places), "a", queued=True)
    assert jobs.pending("a").word == "waiting" and jobs.early_end("a") == ""


def test_a_runner_that_was_killed_is_started_again_by_the_app_that_runs_or_the_next_one(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    jobs.queue.add(preset.load(preset_file(places, steps=3)), "a")
    jobs.listing()
    wait(lambda: (places.runs / "a").exists() and state(jobs, "a").word == "done")


def test_why_the_queue_gave_a_run_up_is_told_until_it_is_resumed(places):
    jobs = Jobs(places, STAND_IN)
    jobs.queue.add(preset.load(preset_file(places)), "a")
    with jobs.queue.claim() as entry:
        jobs.queue.fail(entry, "out of luck")
    assert jobs.early_end("a") == "out of luck" and jobs.pending("a").word == "failed"
    jobs.resume(run.create(places.workspace, "a", preset.dumps(preset.load(preset_file(places)))))
    wait(lambda: state(jobs, "a").word == "done")
    assert jobs.early_end("a") == "" and jobs.queue.failures() == []


def test_a_resume_waits_while_another_run_is_on(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    old = run.create(places.workspace, "old", preset.dumps(preset.load(preset_file(places, steps=3))))
    jobs.start(preset_file(places, steps=10_000), "a")
    wait(lambda: state(jobs, "a").word == "training")
    assert jobs.resume(old) and state(jobs, "old").word == "waiting"
    assert state(jobs, "old").text == "waits in the queue: place 1 of 1"
    with pytest.raises(UserError, match="old waits in the queue already"):
        jobs.resume(old)
    jobs.order(places.run("a"), "stop", [])
    wait(lambda: state(jobs, "old").word == "done")
    wait(lambda: not jobs.queue.is_served())


def test_a_branch_begins_waits_its_turn_and_refuses_what_it_cannot_have(places):
    jobs, origin = Jobs(places, (*STAND_IN, "--pace", "0.001")), measured(places.workspace)
    assert jobs.branch(origin, 100, "", ["train.steps = 105", "train.lr=5e-5"]) == "measured-2"
    wait(lambda: state(jobs, "measured-2").word == "done")
    branch = places.run("measured-2")
    assert branch.origin() == ("measured", 100) and preset.load(branch.preset).train.lr == 5e-5
    with pytest.raises(UserError, match="already a run called 'measured'"):
        jobs.branch(origin, 100, "measured", [])
    with pytest.raises(UserError, match="cannot change adapter.rank"):
        jobs.branch(origin, 100, "b", ["adapter.rank = 4"])
    with pytest.raises(UserError, match="no checkpoint at step 7"):
        jobs.branch(origin, 7, "b", [])
    with pytest.raises(UserError, match="train.steps"):
        jobs.branch(origin, 100, "b", ["train.steps"])
    assert not (places.runs / "b").exists()


def test_a_run_is_renamed_put_into_the_trash_and_had_back(places):
    jobs = Jobs(places, STAND_IN)
    jobs.start(preset_file(places), "a")
    wait(lambda: state(jobs, "a").word == "done")
    assert [row.name for row in jobs.listing()] == ["a"]
    assert jobs.rename(places.run("a"), "b") == "b"
    assert [row.name for row in jobs.listing()] == ["b"] and jobs.pending("a") is None
    entry = jobs.delete(places.run("b"))
    assert jobs.listing() == [] and jobs.pending("b") is None
    assert jobs.restore(entry) == "b" and state(jobs, "b").word == "done"
    with pytest.raises(UserError):
        jobs.restore("../../runs/b")


def test_a_run_that_is_on_is_neither_renamed_nor_deleted(places):
    jobs = Jobs(places, (*STAND_IN, "--pace", "0.02"))
    jobs.start(preset_file(places, steps=10_000), "a")
    wait(lambda: state(jobs, "a").word == "training")
    for work in (lambda: jobs.rename(places.run("a"), "b"), lambda: jobs.delete(places.run("a"))):
        with pytest.raises(UserError):
            work()
    jobs.order(places.run("a"), "stop", [])
    wait(lambda: state(jobs, "a").word == "stopped")


def test_prompts_wait_for_the_next_start_and_none_are_refused(places):
    jobs, ours = Jobs(places, STAND_IN), measured(places.workspace)
    jobs.order(ours, "prompts", ["a frog"])
    assert (ours.control / "prompts").read_text() == '["a frog"]'
    with pytest.raises(UserError, match="at least one prompt"):
        jobs.order(ours, "prompts", [])
