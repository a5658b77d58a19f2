"""The runner trains what waits, whatever is killed, and goes on after a failure."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.run_folders import PRESET
from trainer import preset as presets
from trainer import run as runs
from trainer import runner
from trainer.detached import TRAINER, start_detached
from trainer.events import EventReader, EventWriter
from trainer.queue import Queue
from trainer.run import Run

STAND_IN = (sys.executable, str(Path(__file__).parent / "app_trainer.py"))
QUICK = ["train.steps=2", "sample.prompts=[]", "evaluate.every=0", "log.tensorboard=false", "output.save_every=0"]


def put(workspace, name, *overrides, source=None):
    preset = presets.load(source, [*QUICK, *overrides]) if source else presets.complete(
        presets.parse(PRESET, "p.toml", overrides), workspace)
    Queue(workspace).add(preset, name)


def serve(workspace, trainer=STAND_IN, environment=None):
    said = []
    runner.serve(workspace, "", trainer, environment or dict(os.environ), said.append)
    return said


def state(workspace, name):
    return Run(workspace / "runs" / name).state()


def wait(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def runner_process(workspace, trainer):
    return start_detached([*trainer, "queue", "run", "--workspace", str(workspace)], workspace / "runner.log").process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def starts(workspace, name):
    return [event["step"] for event in EventReader(Run(workspace / "runs" / name).events).read()
            if event["kind"] == "start"]


def test_three_runs_with_a_failing_one_whose_failure_is_kept(tiny_project, tmp_path):
    for name, overrides in (("one", []), ("two", ["data.folder=/nowhere"]), ("three", [])):
        put(tmp_path, name, *overrides, source=tiny_project)
    said = serve(tmp_path, TRAINER)
    assert [line.split(" ")[0].rstrip(":") for line in said] == ["one", "one", "two", "two", "three", "three"]
    assert [state(tmp_path, name).word for name in ("one", "two", "three")] == ["done", "failed", "done"]
    [failure] = Queue(tmp_path).failures()
    assert failure.name == "two" and "/nowhere" in failure.reason
    assert Queue(tmp_path).names() == set() and Run(tmp_path / "runs" / "three").result.is_file()
    ends = [Run(tmp_path / "runs" / name).events.stat().st_mtime for name in ("one", "two", "three")]
    assert ends == sorted(ends)


def test_a_killed_runner_leaves_its_run_alone_and_the_next_one_goes_on(tmp_path):
    paced = (*STAND_IN, "--pace", "0.02")
    put(tmp_path, "a", "train.steps=120")
    put(tmp_path, "b", "train.steps=3")
    first = runner_process(tmp_path, paced)
    wait(lambda: state(tmp_path, "a").step > 3)
    kill(first)
    before = state(tmp_path, "a").step
    wait(lambda: state(tmp_path, "a").step > before + 3)
    serve(tmp_path, paced)
    assert [state(tmp_path, name).word for name in "ab"] == ["done", "done"]
    assert starts(tmp_path, "a") == [0] and starts(tmp_path, "b") == [0]


def test_after_a_power_cut_the_run_goes_on_from_its_checkpoint(tmp_path):
    paced = (*STAND_IN, "--pace", "0.02")
    put(tmp_path, "a", "train.steps=100")
    first = runner_process(tmp_path, paced)
    run = Run(tmp_path / "runs" / "a")
    wait(lambda: state(tmp_path, "a").step > 3)
    run.request("save")
    saved = wait(run.last_step)
    kill(first)
    [pid] = [event["pid"] for event in EventReader(run.events).read() if event["kind"] == "start"]
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not run.is_held())
    serve(tmp_path, paced)
    assert state(tmp_path, "a").word == "done" and starts(tmp_path, "a") == [0, saved]


def test_an_orderly_shutdown_is_not_taken_for_a_wish_to_stop(tmp_path):
    paced = (*STAND_IN, "--pace", "0.02")
    put(tmp_path, "a", "train.steps=60")
    first = runner_process(tmp_path, paced)
    wait(lambda: state(tmp_path, "a").step > 3)
    kill(first)
    Run(tmp_path / "runs" / "a").request("stop")  # as SIGTERM does
    wait(lambda: state(tmp_path, "a").word == "stopped")
    serve(tmp_path, paced)
    assert state(tmp_path, "a").word == "done"


@pytest.mark.parametrize("let_go", [False, True])
def test_a_run_that_is_stopped_by_a_person_is_not_taken_up_again(tmp_path, let_go):
    paced = (*STAND_IN, "--pace", "0.02")
    put(tmp_path, "a", "train.steps=10000")
    put(tmp_path, "b", "train.steps=3")
    thread = threading.Thread(target=serve, args=(tmp_path, paced))
    thread.start()
    wait(lambda: state(tmp_path, "a").step > 3)
    if let_go:
        Queue(tmp_path).let_go("a")
    Run(tmp_path / "runs" / "a").request("stop")
    thread.join(60)
    assert state(tmp_path, "a").word == "stopped" and state(tmp_path, "b").word == "done"
    assert Queue(tmp_path).names() == set() and Queue(tmp_path).failures() == []


def test_a_trainer_that_dies_each_time_is_given_up_after_three(tmp_path):
    put(tmp_path, "a")
    put(tmp_path, "b")
    dying = (sys.executable, "-c", "import os, sys; print('out of luck', flush=True); os.kill(os.getpid(), 9)")
    serve(tmp_path, dying)
    assert [failure.name for failure in Queue(tmp_path).failures()] == ["a", "b"]
    assert "died 3 times at step 0: out of luck" in Queue(tmp_path).failures()[0].reason


def test_a_file_that_is_no_preset_fails_and_the_rest_goes_on(tmp_path):
    put(tmp_path, "b", "train.steps=2")
    (tmp_path / "queue" / "0000-a.toml").write_text("[model]\nfamly = 1\n")
    serve(tmp_path)
    [failure] = Queue(tmp_path).failures()
    assert failure.name == "a" and "model.famly: no such key. Did you mean family?" in failure.reason
    assert state(tmp_path, "b").word == "done"


def test_a_run_that_was_started_otherwise_is_waited_for(tmp_path):
    paced = (*STAND_IN, "--pace", "0.02")
    file = tmp_path / "p.toml"
    file.write_text(PRESET.replace("100", "60"))
    start_detached([*paced, "--preset", str(file), "--name", "direct", "--workspace", str(tmp_path)],
                   tmp_path / "direct.log")
    wait(lambda: state(tmp_path, "direct").step > 1)
    put(tmp_path, "a", "train.steps=2")
    serve(tmp_path, paced)
    first = EventReader(Run(tmp_path / "runs" / "a").events).read()[0]["t"]
    last = EventReader(Run(tmp_path / "runs" / "direct").events).read()[-1]
    assert last["kind"] == "end" and last["t"] <= first


def test_each_gpu_gets_a_runner_whose_runs_see_that_gpu_alone(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}
    assert runner.gpus(environment) == ["GPU-a", "GPU-b"]
    assert runner.gpus({"CUDA_VISIBLE_DEVICES": ""}) == [""]
    for name in ("a", "b"):
        put(tmp_path, name)
    put(tmp_path, "pinned", "memory.device=cuda:1")
    (tmp_path / "seen.py").write_text(
        "import os, pathlib, sys, time\nsys.path.insert(0, sys.argv[1])\nfrom trainer.run import Run\n"
        "from trainer.events import EventWriter\nrun = Run(pathlib.Path(sys.argv[-1]))\n"
        "with run.hold():\n    time.sleep(1)\n    (run.path / 'saw').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    EventWriter(run.events).write('end', step=1, reason='done')\n")
    trainer = (sys.executable, str(tmp_path / "seen.py"), str(Path(__file__).parent.parent))
    threads = [threading.Thread(target=runner.serve, args=(tmp_path, gpu, trainer, environment, print))
               for gpu in ("GPU-a", "GPU-b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    saw = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/saw")}
    assert {saw["a"], saw["b"]} == {"GPU-a", "GPU-b"} and saw["pinned"] == "GPU-a, GPU-b"


def test_a_run_of_several_gpus_has_them_alone_also_when_all_runners_look_at_once(tmp_path):
    put(tmp_path, "both", "memory.device=cuda:0,1")
    put(tmp_path, "one")
    queue, known = Queue(tmp_path), ["GPU-a", "GPU-b"]
    with queue.claim(lambda entry: runner._has_room(queue, entry, "GPU-a", known)) as first:
        assert first.name == "both" and not (tmp_path / "runs").exists()
        with queue.claim(lambda entry: runner._has_room(queue, entry, "GPU-b", known)) as second:
            assert second is None and [entry.name for entry in queue.waiting()] == ["one"]
        queue.let_go("both")
    with queue.claim(lambda entry: runner._has_room(queue, entry, "GPU-b", known)) as second:
        assert second.name == "one"


def test_runners_are_started_only_when_something_waits_and_nobody_serves(tmp_path):
    assert runner.start_runners(tmp_path, STAND_IN, dict(os.environ)) == 0
    put(tmp_path, "a", "train.steps=2")
    with Queue(tmp_path).seat("") as seated:
        assert seated and runner.start_runners(tmp_path, STAND_IN, {**os.environ, "CUDA_VISIBLE_DEVICES": ""}) == 0
    assert runner.start_runners(tmp_path, STAND_IN, {**os.environ, "CUDA_VISIBLE_DEVICES": ""}) == 1
    wait(lambda: state(tmp_path, "a").word == "done" and not Queue(tmp_path).names())


def test_a_run_waits_to_go_on_whatever_it_did_before(tmp_path):
    put(tmp_path, "again", "train.steps=6")
    serve(tmp_path)
    run = Run(tmp_path / "runs" / "again")
    events = EventWriter(run.events)
    for _ in range(3):
        events.write("start", step=6, steps=6)
    events.write("end", step=6, reason="error", error="the disk was full")
    assert run.state().word == "failed"
    time.sleep(0.02)  # what is added now is younger than that
    Queue(tmp_path).add_resume(run)
    serve(tmp_path)
    assert Queue(tmp_path).failures() == []
    assert state(tmp_path, "again").word == "done" and Queue(tmp_path).names() == set()


def test_a_run_that_is_gone_cannot_go_on(tmp_path):
    put(tmp_path, "a")
    serve(tmp_path)
    run = Run(tmp_path / "runs" / "a")
    Queue(tmp_path).add_resume(run)
    run.path.rename(tmp_path / "elsewhere")
    serve(tmp_path)
    [failure] = Queue(tmp_path).failures()
    assert failure.reason == "the folder of the run a is not there any more; it cannot go on"


@pytest.mark.parametrize(("living", "own", "gpu", "has_room"), [
    (["auto"], "auto", "b", True),
    (["cuda:0,1"], "auto", "c", True),
    (["cuda:0,1"], "auto", "b", False),  # its GPU is taken; another runner has a free one
    (["cuda:0,1", "auto"], "auto", "c", False),  # a GPU each, and two for the first
    (["auto"], "cuda:0,1", "c", True),
    (["auto", "auto"], "cuda:0,1", "c", False),
    (["cuda:1"], "cuda:0,1", "c", False),
    ([], "cuda:0,1,2,3", "a", True),  # more than there are: it begins, and says so
])
def test_each_gpu_of_a_run_is_taken(tmp_path, living, own, gpu, has_room):
    for number, device in enumerate(living):
        preset = presets.complete(presets.parse(PRESET, "p.toml", [f"memory.device={device}"]), tmp_path)
        runs.create(tmp_path, f"on-{number}", presets.dumps(preset))  # about to be trained
    put(tmp_path, "next", f"memory.device={own}")
    queue = Queue(tmp_path)
    assert runner._has_room(queue, queue.waiting()[0], gpu, ["a", "b", "c"]) == has_room
