"""`list`, `show`, `compare` and `stop`, as a shell sees them."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.run_folders import PRESET, finished
from trainer import notes
from trainer import preset as presets
from trainer import run as runs
from trainer.events import EventWriter
from trainer.queue import Queue


def test_a_list_has_a_line_a_run_the_newest_first(tmp_path, trainer):
    assert trainer("list", "--workspace", tmp_path) == (0, f"no runs in {tmp_path / 'runs'}\n", "")
    finished(tmp_path, "old")
    time.sleep(0.02)
    finished(tmp_path, "new", "adapter.method=lora")
    head, *lines = trainer("list", "--workspace", tmp_path).out.splitlines()
    assert head.split() == ["name", "state", "step", "best", "loss", "s/it", "method", "started"]
    assert [line.split("  ")[0] for line in lines] == ["new", "old"]
    assert "done at step 100  100 of 100  –     0.01376  0.5   lora" in lines[0]
    listed = json.loads(trainer("list", "--json", "--workspace", tmp_path).out)
    assert [(row["name"], row["state"], row["step"]) for row in listed] == [("new", "done", 100), ("old", "done", 100)]


def test_show_tells_all_of_a_run(tmp_path, trainer):
    run = finished(tmp_path, "a", "adapter.rank=5", validation=0.25, kid=(14.2, 4.1, 24.3))
    events = EventWriter(run.events)
    events.write("skipped", file="x.png", reason="not an image")
    events.write("note", step=3, text="step 3 was skipped")
    events.write("best", step=50, by="validation", value=0.25, why="its validation loss is the lowest")
    notes.write(run, "too warm\nnext: less steps")
    text = trainer("show", "a", "--workspace", tmp_path).out
    for part in ("0.5 s/it, 1.0 min in all", "4 GB", "0.25 at 100; first 0.3 at 50; best 0.25 at 100",
                 "14.2 (4.1 to 24.3), efflite0, 24 generated and 48 held-out", "158.1 (floor 143.2)", "up 3, down 5",
                 "nearest to the defaults, but for\n  adapter.rank = 5  (there: 16)",
                 "a.safetensors  step 100  4 kB  U1  read back: worst relative error 0.00034",
                 "left out: x.png: not an image", "step 3 was skipped",
                 "best         50: its validation loss is the lowest", "own notes\n  too warm\n  next: less steps"):
        assert part in text, part
    data = json.loads(trainer("show", "a", "--json", "--workspace", tmp_path).out)
    assert (data["best"]["step"], data["own_notes"]) == (50, "too warm\nnext: less steps")
    listed, = json.loads(trainer("list", "--json", "--workspace", tmp_path).out)
    assert listed["best"] == 50 and " 50 " in trainer("list", "--workspace", tmp_path).out.splitlines()[1]
    assert data["preset"]["adapter"]["rank"] == 5 and data["distance"]["kid"] == 14.2


def test_compare_sets_runs_side_by_side_and_says_what_counts(tmp_path, trainer):
    finished(tmp_path, "a", "adapter.rank=4", "data.flip=true", validation=0.2, kid=(14.0, 4.0, 24.0))
    finished(tmp_path, "b", "adapter.rank=8", validation=0.3, kid=(90.0, 80.0, 100.0))
    rows = trainer("compare", "a", "b", "--workspace", tmp_path).out.splitlines()
    cells = {row[:15].strip(): row[15:].split("  ") for row in rows[:15]}
    assert [cell.strip() for cell in cells["rank"] if cell.strip()] == ["4", "8"]
    assert [cell.strip() for cell in cells["validation loss"] if cell.strip()] == ["0.2 at 100", "0.3 at 100"]
    assert any(row.split() == ["data.flip", "True", "False"] for row in rows)
    assert rows[-2] == ("validation loss: a is below b by 0.1: cannot be told (one seed tells nothing of the noise "
                        "between seeds; train both with two more)")
    assert rows[-1] == "KID ×10³: a is below b by 76 (95 %: 61.9 to 90.1): significant (24 pictures each)"
    assert json.loads(trainer("compare", "a", "b", "--json", "--workspace", tmp_path).out)["findings"][1][
        "verdict"] == "significant"
    assert "takes 2 to 50 different runs, not 1" in trainer("compare", "a", "a", "--workspace", tmp_path).err


def test_stop_posts_the_request_and_says_what_follows(tmp_path, trainer):
    run = finished(tmp_path, "a")
    refused = trainer("stop", "a", "--workspace", tmp_path)
    assert refused == (1, "", "a is not being trained (done at step 100): there is nothing to stop\n")
    with run.hold():
        said = trainer("stop", "a", "--workspace", tmp_path)
        assert said.code == 0 and f"--resume {run.path}" in said.out and run.asked("stop")


def test_stop_can_wait_for_the_end(tmp_path, trainer):
    run, held, ended = finished(tmp_path, "a"), threading.Event(), []

    def train():
        with run.hold():
            held.set()
            while run.take("stop") is None:
                time.sleep(0.01)
            time.sleep(0.3)
            ended.append(True)

    thread = threading.Thread(target=train)
    thread.start()
    assert held.wait(10)
    said = trainer("stop", "a", "--wait", "--workspace", tmp_path)
    assert ended and said.out.startswith("a: done at step 100")
    thread.join()


@pytest.mark.parametrize("words", [["show", "b"], ["stop", "b"], ["compare", "a", "b"]])
def test_an_unknown_run_is_a_users_error_with_the_nearest_name(tmp_path, trainer, words):
    finished(tmp_path, "a")
    finished(tmp_path, "bb")
    outcome = trainer(*words, "--workspace", tmp_path)
    assert outcome.code == 1 and "there is no run called 'b'" in outcome.err and "did you mean bb?" in outcome.err


def test_faulty_words_are_users_errors(tmp_path, trainer):
    assert trainer("show").code == 1 and "--help" in trainer("show").err
    assert trainer("list", "--bad").code == 1


def test_the_verbs_load_no_torch_and_bear_any_terminal(tmp_path):
    finished(tmp_path, "a", kid=(14.0, 4.0, 24.0))
    program = ("import sys; from trainer.__main__ import main\n"
               f"code = main(['show', 'a', '--workspace', {str(tmp_path)!r}])\n"
               "sys.exit(code or any(name in sys.modules for name in ('torch', 'gradio', 'diffusers')))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=Path(__file__).parent.parent,
                          env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"})
    assert done.returncode == 0 and b"KID ?10? (95 %)" in done.stdout, done.stderr
    assert runs.list_runs(tmp_path)


def test_the_queue_is_filled_ordered_and_emptied_at_the_shell(tmp_path, trainer):
    preset = tmp_path / "p.toml"
    preset.write_text(PRESET)
    with Queue(tmp_path).seat("") as seated:  # so that nothing begins
        assert seated
        for words in (["add", preset], ["add", preset], ["add", preset, "--name", "own", "--set", "train.steps=7"],
                      ["move", "own", "1"], ["cancel", "p-2"]):
            outcome = trainer("queue", *words, "--workspace", tmp_path)
            assert outcome.code == 0, outcome.err
    assert outcome.out == "waits  1  own\nwaits  2  p\n"
    assert presets.load(Queue(tmp_path).waiting()[0].path).train.steps == 7
    listed = json.loads(trainer("queue", "--workspace", tmp_path, "list", "--json").out)
    assert listed == {"begun": [], "waiting": ["own", "p"], "failed": {}}
    refused = trainer("queue", "cancel", "p-2", "--workspace", tmp_path)
    assert refused.code == 1 and "there is: own, p" in refused.err
    assert trainer("queue", "--workspace", tmp_path / "empty").out == "nothing waits\n"
    with Queue(tmp_path).claim() as entry:
        Queue(tmp_path).fail(entry, "no such folder\nmore")
    assert trainer("queue", "list", "--workspace", tmp_path).out == (
        "waits   1  p\nfailed     own  no such folder\n")
    assert trainer("queue", "dismiss", "own", "--workspace", tmp_path).out == "waits  1  p\n"


def test_show_of_a_run_that_cannot_be_read_does_not_speak_of_room(tmp_path, trainer):
    run = finished(tmp_path, "a")
    run.events.unlink()
    run.events.mkdir()
    code, _, err = trainer("show", "a", "--workspace", tmp_path)
    assert code == 1 and "events.jsonl cannot be read: Is a directory; see that" in err and "room" not in err
