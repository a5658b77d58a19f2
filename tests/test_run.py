"""Run folders: one trainer at a time, requests, and a state that is always derived."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import preset as presets
from trainer import run as runs
from trainer.errors import UserError
from trainer.events import EventWriter
from trainer.run import Run, State
from trainer.workfolder import ONCE

HOLDER = """
import sys, time
from pathlib import Path
from trainer.errors import UserError
from trainer.run import Run
try:
    with Run(Path(sys.argv[1])).hold():
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""

LOOKER = """
import sys
from pathlib import Path
from trainer.run import Run
run = Run(Path(sys.argv[1]))
print(flush=True)
while True:
    run.is_held()
"""


@pytest.fixture
def run(tmp_path):
    return runs.create(tmp_path, "cat", "[train]\nsteps = 9\n")


@contextmanager
def another_trainer(run: Run):
    """A second process that holds the run until the block ends; killing it is fine too."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    try:
        yield process
    finally:
        process.communicate(b"")
    assert process.returncode in (0, -9)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A run that another process holds all the while; its events are each test's own."""
    held = runs.create(tmp_path_factory.mktemp("held"), "cat", "")
    with another_trainer(held):
        yield held


def say(run: Run, *events: dict) -> None:
    run.events.unlink(missing_ok=True)
    writer = EventWriter(run.events)
    for event in events:
        writer.write(**event)
    writer.close()


def event(kind: str, **fields: object) -> dict:
    return {"kind": kind, **fields}


START = event("start", step=0, steps=9)
STEP = event("step", step=4, steps=9, loss=0.5)
LIVING = {
    "nothing said": ([], State("starting", "starting", alive=True)),
    "start": ([START], State("starting", "starting", 0, 9, alive=True)),
    "phase": ([START, event("phase", name="caching latents", done=120, of=300)],
              State("starting", "caching latents 120 of 300", 0, 9, alive=True)),
    "phase without a number": ([START, event("phase", name="loading the base", done=0, of=0)],
                               State("starting", "loading the base", 0, 9, alive=True)),
    "phase between steps": ([START, STEP, event("phase", name="drawing samples", done=1, of=2)],
                            State("training", "drawing samples 1 of 2", 4, 9, alive=True)),
    "step": ([START, STEP], State("training", "training, step 4 of 9", 4, 9, alive=True)),
    "a rank after a step": ([START, STEP, event("rank", step=4, erank={})],
                            State("training", "training, step 4 of 9", 4, 9, alive=True)),
    "an unknown kind": ([START, STEP, event("weather", sunny=True)],
                        State("training", "training, step 4 of 9", 4, 9, alive=True)),
    "paused": ([START, STEP, event("paused", step=4, text="paused")],
               State("paused", "paused at step 4", 4, 9, alive=True)),
    "resumed": ([START, STEP, event("paused", step=4), event("resumed", step=4)],
                State("training", "training, step 4 of 9", 4, 9, alive=True)),
    "resumed from an earlier step": ([START, STEP, event("start", step=2, steps=9)],
                                     State("starting", "starting", 2, 9, alive=True)),
    "an end from before": ([START, STEP, event("end", step=4, reason="stopped")],
                           State("starting", "starting", 4, 9, alive=True)),
}


@pytest.mark.parametrize("events, state", LIVING.values(), ids=LIVING)
def test_state_while_a_trainer_lives(held, events, state):
    say(held, *events)
    assert held.state() == state


@pytest.mark.parametrize("last, word, text", [
    (STEP, "silent", "no sign of life for 7 min"),
    (event("phase", name="loading"), "silent", "no sign of life for 7 min"),
    (event("paused", step=4), "paused", "paused at step 4"),  # it has nothing to say meanwhile
], ids=["step", "phase", "paused"])
def test_state_after_minutes_without_a_word(held, last, word, text):
    say(held, START, STEP, last)
    assert held.state(now=time.time() + 299).word != "silent"
    state = held.state(now=time.time() + 420)
    assert (state.word, state.text, state.alive) == (word, text, True)


GONE = {
    "never begun": ([], State("new", "not started yet")),
    "done": ([START, STEP, event("end", step=9, reason="done")], State("done", "done at step 9", 9, 9)),
    "stopped": ([START, STEP, event("end", step=4, reason="stopped")], State("stopped", "stopped at step 4", 4, 9)),
    "early": ([START, STEP, event("end", step=4, reason="early", text="no lower loss")],
              State("early", "stopped early at step 4: no lower loss", 4, 9)),
    "failed": ([START, STEP, event("end", step=4, reason="error", error="the disk is full")],
               State("failed", "failed at step 4: the disk is full", 4, 9)),
    "failed without a word": ([START, event("end", step=0, reason="error")],
                              State("failed", "failed at step 0: see trainer.log", 0, 9)),
    **{f"killed at {last['kind']}": ([START, STEP, last], State("crashed", "crashed; last saved at step 3", step, 9))
       for last, step in ((STEP, 4), (event("phase", name="loading"), 4), (event("paused", step=4), 4),
                          (event("start", step=3, steps=9), 3), (event("weather"), 4))},
}


def test_files_that_cannot_be_read_are_a_state_and_no_fault(run):
    run.events.mkdir()  # root may read whatever has no rights, but not this
    state = run.state()
    assert (state.word, state.text) == ("failed", f"{run.events}: cannot be read: Is a directory")


@pytest.mark.parametrize("events, state", GONE.values(), ids=GONE)
def test_state_when_no_trainer_lives(run, events, state):
    if events:
        say(run, *events)
    run.checkpoint(3).mkdir(parents=True)
    assert run.state() == state


def test_progress_is_found_far_back(held):
    say(held, START, STEP, *(event("phase", name="x" * 50, done=i, of=500) for i in range(500)))
    assert (held.state().step, held.state().steps) == (4, 9)


def test_a_second_trainer_is_refused_and_a_kill_frees_the_run(run):
    assert not run.is_held()
    with another_trainer(run) as first:
        assert run.is_held() and run.is_held()
        second = subprocess.run([sys.executable, "-c", HOLDER, str(run.path)], input="", text=True, capture_output=True)
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr == (f"{run.path} is being trained by another process; stop that one first, "
                                 "or wait for it to end\n")
        assert run.is_held()
        first.kill()
        first.wait()
        assert not run.is_held()
        with another_trainer(run):
            assert run.is_held()
    assert not run.is_held()


def test_a_run_that_ends_while_its_state_is_worked_out_has_ended_and_not_crashed(run, monkeypatch):
    say(run, START, STEP)

    def ends(self: Run) -> bool:
        say(self, START, STEP, event("end", reason="done", step=9, steps=9))
        return False

    monkeypatch.setattr(Run, "is_held", ends)
    assert run.state() == State("done", "done at step 9", 9, 9)


def test_a_look_at_the_lock_does_not_keep_a_trainer_out(run):
    looker = subprocess.Popen([sys.executable, "-c", LOOKER, str(run.path)], stdout=subprocess.PIPE)
    looker.stdout.readline()
    try:
        for _ in range(10):
            with run.hold():
                assert run.is_held()
        assert sum(run.is_held() for _ in range(50)) < 3  # nor does it pass for one
    finally:
        looker.kill()
        looker.communicate()


def test_a_trainer_starts_without_old_requests_but_stays_paused(run):
    for request in ("stop", "save", "sample", "pause"):
        run.request(request)
    with run.hold():
        assert [request for request in ("stop", "save", "sample", "pause") if run.asked(request)] == ["pause"]
        run.request("stop")
        assert run.asked("stop")


@pytest.mark.parametrize("request_", ONCE)
def test_a_request_is_taken_once(run, request_):
    assert run.take(request_) is None
    run.request(request_)
    assert run.asked(request_)
    assert run.take(request_) == {}
    assert not run.asked(request_) and run.take(request_) is None


def test_anyone_may_touch_a_request(run):
    (run.control / "stop").touch()
    assert run.asked("stop") and run.take("stop") == {}


def test_a_pause_lasts_until_it_is_withdrawn(run):
    run.request("pause")
    assert run.asked("pause") and run.asked("pause")
    run.withdraw("pause")
    run.withdraw("pause")
    assert not run.asked("pause")


def test_a_request_for_samples_carries_its_prompts(run):
    run.request("sample", {"prompts": ["a “red” cat", "日本"]})
    assert list(run.control.iterdir()) == [run.control / "sample"]
    assert run.take("sample") == {"prompts": ["a “red” cat", "日本"]}


@pytest.mark.parametrize("content", [b"{oops", b"[1]", b'"text"', b"\xff", b" \n", b"null"])
def test_a_request_with_nonsense_in_it_counts_as_plain(run, content):
    (run.control / "sample").write_bytes(content)
    assert run.take("sample") == {}
    assert not run.asked("sample")


def test_a_new_run_has_its_preset_and_takes_requests(tmp_path):
    run = runs.create(tmp_path, "cat style", "# mine\n")
    assert run.path == tmp_path / "runs" / "cat style"
    assert run.preset.read_text() == "# mine\n"
    run.request("stop")
    assert runs.open_run(run.path).name == "cat style"
    assert run.result == run.path / "cat style.safetensors"
    assert run.export_of(500) == run.path / "exports" / "cat style-000500.safetensors"


def test_a_taken_name_is_refused_with_the_way_to_go_on(run):
    with pytest.raises(UserError) as caught:
        runs.create(run.path.parent.parent, "cat", "")
    assert str(caught.value) == (f"there is already a run called 'cat'. To go on with it: python -m trainer --resume "
                                 f"{run.path}. For a new one give another --name.")
    assert run.preset.read_text() == "[train]\nsteps = 9\n"


def ended(workspace, name, reason, step):
    run = runs.create(workspace, name, "x = 1")
    writer = EventWriter(run.events)
    writer.write("end", step=step, reason=reason, error="data.folder: … is not there")
    writer.close()
    return run


def test_a_run_that_never_began_gives_way_to_the_next_try(tmp_path):
    run = ended(tmp_path, "cat", "error", 0)
    assert not runs.is_taken(tmp_path, "cat") and runs.free_name(tmp_path, "cat") == "cat"
    runs.create(tmp_path, "cat", "x = 2")
    assert run.preset.read_text() == "x = 2" and not run.events.exists()


def test_a_folder_whose_making_was_killed_gives_way_and_any_other_folder_stays(tmp_path):
    half = tmp_path / "runs" / "cat"
    (half / "control").mkdir(parents=True)
    (half / ".preset.toml.x7").touch()
    assert runs.create(tmp_path, "cat", "x = 1").preset.is_file()
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="already a run called"):
        runs.create(tmp_path, "mine", "x = 1")


@pytest.mark.parametrize("reason, step, file", [
    ("stopped", 0, None), ("error", 3, None), ("error", 0, "cat.safetensors"),
    ("error", 0, "exports/cat-000003.safetensors"), ("error", 0, "checkpoints/step_000003/adapter.safetensors"),
    ("error", 0, "notes.md"),
])
def test_a_run_with_anything_in_it_never_gives_way(tmp_path, reason, step, file):
    run = ended(tmp_path, "cat", reason, step)
    if file:
        (run.path / file).parent.mkdir(parents=True, exist_ok=True)
        (run.path / file).touch()
    assert runs.free_name(tmp_path, "cat") == "cat-2"
    with pytest.raises(UserError, match="already a run called"):
        runs.create(tmp_path, "cat", "x = 2")


def test_a_full_disk_leaves_the_name_free(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        runs.create(tmp_path, "cat", "")
    assert runs.create(tmp_path, "cat", "").preset.exists()


HOSTILE = ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "a\0b", "a\nb", "cat\n", "-rf", ".hidden", " x", "x ", "x.",
           "ä", "a:b", "a*", "%2e%2e", "~", "x" * 101, "con", "CON", "Nul.toml", "com1", "lpt9.x", "aux .txt"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_folders_name_everywhere_is_refused(tmp_path, name):
    with pytest.raises(UserError) as caught:
        runs.create(tmp_path, name, "")
    assert str(caught.value) == (f"{name!r} cannot be a run's name: use letters, digits, '.', '_', '-' and blanks, "
                                 "starting with a letter or digit, at most 100 characters")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "Cat style-2.1", "x" * 100, "console", "com", "9"])
def test_ordinary_names_are_taken(tmp_path, name):
    assert runs.create(tmp_path, name, "").preset.is_file()


def test_a_run_without_a_name_gets_the_first_free_number(tmp_path):
    names = []
    for _ in range(3):
        names.append(runs.free_name(tmp_path, "demo"))
        runs.create(tmp_path, names[-1], "")
    assert names == ["demo", "demo-2", "demo-3"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.text(max_size=130), st.sampled_from([*HOSTILE, "con-2", "é" * 50, "x" * 89 + ". y"])))
def test_any_presets_name_makes_a_possible_name(tmp_path, stem):
    name = runs.free_name(tmp_path, stem)
    runs.check_name(name)
    runs.check_name(f"{name}-1000")


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError) as caught:
        runs.open_run(tmp_path / "nothing")
    assert str(caught.value).startswith(f"{tmp_path / 'nothing'}: not a run folder (it has no preset.toml); give one")


def test_runs_are_listed_the_newest_first_and_other_folders_are_not(tmp_path):
    assert runs.list_runs(tmp_path) == []
    for age, name in enumerate(["c", "a", "b"]):
        os.utime(runs.create(tmp_path, name, "").preset, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "notes").mkdir()
    assert [run.name for run in runs.list_runs(tmp_path)] == ["c", "a", "b"]


def test_only_whole_checkpoints_count(run):
    assert (run.checkpoint_steps(), run.last_step()) == ([], 0)
    for name in ("step_000020", "step_000005", "step_1000000", ".step_000030.tmp", "step_40", "step_000050.tmp",
                 "other"):
        (run.checkpoints / name).mkdir(parents=True)
    assert (run.checkpoint_steps(), run.last_step()) == ([5, 20, 1_000_000], 1_000_000)
    assert all(run.checkpoint(step).is_dir() for step in run.checkpoint_steps())


def test_the_log_ends_with_its_last_lines(run):
    assert run.log_tail() == ""
    run.log.write_bytes(b"\xff first\n" + b"".join(b"line %d\n" % number for number in range(20_000)))
    assert run.log_tail(3) == "line 19997\nline 19998\nline 19999"
    run.log.write_bytes(b"caf\xe9\nend")
    assert run.log_tail() == "caf\ufffd\nend"


def test_looking_at_a_run_is_cheap(run):
    """The app looks at every run once a second, and the loop at every request after each step."""
    say(run, START, *[STEP] * 100)
    began = time.perf_counter()
    for _ in range(100):
        run.state()
    assert time.perf_counter() - began < 100 * 0.01
    began = time.perf_counter()
    for _ in range(1000):
        run.asked("stop")
    assert time.perf_counter() - began < 1000 * 0.0005


def test_a_fault_in_a_runs_preset_names_the_run(tmp_path):
    with pytest.raises(UserError, match=r"(?m)^my_style/preset\.toml:2: train\.step: no such key"):
        presets.load(runs.create(tmp_path, "my_style", "[train]\nstep = 1\n").preset)
