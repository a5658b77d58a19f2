"""What the server's functions answer: to a page, and to anybody who sends anything."""

import itertools
import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import components
from app.datasets.library import Library
from app.jobs import SHARED_FOR, Jobs
from app.paths import Places
from app.tabs import preset, train
from trainer import run
from trainer.events import EventWriter

STAND_IN = (sys.executable, str(Path(__file__).parent / "app_trainer.py"))
TEXT = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = 3\n'


def functions(jobs):
    """Every server function of the app, by name."""
    import gradio as gr

    with gr.Blocks() as page:
        library = Library(jobs.places)
        train.build(jobs, library)
        preset.build(jobs, library)
    return {name: function for block in page.blocks.values() if isinstance(block, components.OwnComponent)
            for function in block.server_fns if (name := function.__name__)}


@pytest.fixture
def jobs(tmp_path):
    return Jobs(Places(tmp_path), STAND_IN)


@pytest.fixture
def server(jobs):
    return functions(jobs)


def wait_for(server, name, word, seconds=30.0):
    end = time.monotonic() + seconds
    while (answer := server["read_run"]({"run": name})).get("state", [""])[0] != word:
        assert time.monotonic() < end, answer
        time.sleep(0.02)
    return answer


def test_the_surface_is_small(server):
    assert set(server) == {"list_runs", "start_demo", "read_run", "order_run", "resume_run", "order_queue",
                           "read_hard", "read_spectrum", "save_notes", "pin_checkpoint", "branch_run", "rename_run",
                           "delete_run", "restore_run", "make_card", "list_sets", "list_presets",
                           "open_preset", "check_preset", "save_preset", "delete_preset",
                           "restore_preset", "list_bases", "use_base", "list_cards", "start_check", "read_check",
                           "stop_check", "start_run"}


def test_from_an_edited_preset_to_a_finished_run(server, jobs):
    begun = server["start_run"]({"text": TEXT, "name": "", "shelf": "own", "run": "first"})
    assert begun == {"run": "first", "waits": False}
    answer = wait_for(server, "first", "done")
    assert answer["steps"]["step"] == [1, 2, 3] and answer["exports"][0]["file"] == "first.safetensors"
    assert answer["folder"] == str(jobs.places.runs / "first")
    listed = server["list_runs"]({})
    assert [row[:2] for row in listed["rows"]] == [["first", "done"]]
    assert server["list_runs"]({"seen": listed["tag"]}) == {"live": {}}
    refused = server["order_run"]({"run": "first", "order": "stop"})
    assert refused == {"error": "first is not being trained at the moment"}
    assert "already a run called 'first'" in server["start_run"](
        {"text": TEXT, "name": "", "shelf": "own", "run": "first"})["error"]


def test_a_faulty_preset_is_not_started(server, jobs):
    answer = server["start_run"]({"text": TEXT + "rank = 3\n", "name": "x", "shelf": "own", "run": "a"})
    assert answer["error"].startswith("x.toml:8: train.rank: no such key")
    assert not jobs.places.runs.exists()


def test_a_trainer_that_did_not_start_says_why(server):
    server["start_run"]({"text": TEXT.replace("pictures", "missing"), "name": "", "shelf": "own", "run": "a"})
    answer = wait_for(server, "a", "failed")
    assert "missing does not exist" in answer["trouble"] and "folder" not in answer


def test_a_demo_that_did_not_start_can_be_started_again(server, tmp_path, monkeypatch):
    demo = tmp_path / "demo.toml"
    monkeypatch.setattr(train, "DEMO", demo)
    for folder, word in (("missing", "failed"), ("pictures", "done")):
        demo.write_text(TEXT.replace("pictures", folder))
        assert server["start_demo"]({}) == {"run": "demo"}
        wait_for(server, "demo", word)


def test_a_crashed_run_shows_the_end_of_its_log_once(server, jobs):
    ours = run.create(jobs.places.workspace, "a", TEXT)
    EventWriter(ours.events).write("step", step=5, steps=10, loss=0.1)
    ours.log.write_text("Traceback\nRuntimeError: CUDA out of memory\n")
    ours.checkpoint(4).mkdir(parents=True)
    answer = server["read_run"]({"run": "a"})
    assert answer["state"][0] == "crashed" and "out of memory" in answer["log"] and answer["saved"] == 4
    assert "log" not in server["read_run"]({"run": "a", "cursor": answer["cursor"], "word": "crashed"})


def test_presets_are_saved_opened_and_never_replaced_by_accident(server, jobs):
    assert server["save_preset"]({"text": TEXT, "name": "mine", "shelf": "shipped"})["text"] == TEXT
    assert server["list_presets"]({})["own"] == ["mine"]
    other = TEXT + "batch_size = 2\n"
    assert server["save_preset"]({"text": other, "name": "mine", "shelf": "own"}) == {"exists": True}
    assert (jobs.places.presets / "mine.toml").read_text() == TEXT
    server["save_preset"]({"text": other, "name": "mine", "shelf": "own", "replace": True})
    opened = server["open_preset"]({"shelf": "own", "name": "mine"})
    assert opened["text"] == other and opened["run"] == "mine" and opened["problems"] == []
    faulty = server["save_preset"]({"text": "x = =", "name": "mine", "shelf": "own", "replace": True})
    assert "not valid TOML" in faulty["error"]
    assert (jobs.places.presets / "mine.toml").read_text() == other
    assert len(list((jobs.places.workspace / "trash/presets").iterdir())) == 1


def test_a_preset_that_was_changed_meanwhile_is_told_and_one_that_was_deleted_comes_back(server, jobs):
    tag = server["save_preset"]({"text": TEXT, "name": "mine", "shelf": "own"})["tag"]
    assert server["open_preset"]({"shelf": "own", "name": "mine"})["tag"] == tag
    (jobs.places.presets / "mine.toml").write_text(TEXT + "batch_size = 2\n")
    answer = server["save_preset"]({"text": TEXT, "name": "mine", "shelf": "own", "tag": tag})
    assert answer == {"changed": "mine was changed by somebody else since you opened it"}
    thrown = server["delete_preset"]({"name": "mine"})["thrown"]
    assert server["list_presets"]({})["own"] == []
    assert server["restore_preset"]({"thrown": thrown}) == {"name": "mine", "thrown": ""}
    assert "batch_size = 2" in (jobs.places.presets / "mine.toml").read_text()
    assert "no preset 'demo'" in server["delete_preset"]({"name": "demo"})["error"]


def test_a_preset_is_checked_unasked_only_while_nothing_is_trained(server, jobs):
    asked = {"text": TEXT, "name": "mine", "shelf": "own"}
    key = server["start_check"](asked)["key"]
    assert server["read_check"]({"key": key})["state"] in ("running", "done")
    assert server["stop_check"]({"key": key}) == {}
    ours = run.create(jobs.places.workspace, "on", TEXT)
    time.sleep(SHARED_FOR)
    with ours.hold():
        assert server["start_check"](asked) == {"held": preset.BUSY}
        key = server["start_check"](asked | {"asked": True})["key"]
        server["stop_check"]({"key": key})
    broken = server["start_check"](asked | {"text": "x = =", "asked": True})
    assert broken["error"].startswith("mine.toml:1: not valid TOML")


def test_one_gpu_or_several_are_chosen_for_a_run_and_a_run_can_be_queued(server, jobs, monkeypatch):
    known = [{"index": 0, "name": "A", "gib": 8}, {"index": 1, "name": "B", "gib": 24}]
    monkeypatch.setattr(preset.cards, "cards", lambda: known)
    started = []
    monkeypatch.setattr(jobs, "start", lambda file, name, queued: started.append((file.read_text(), name, queued)))
    asked = {"text": TEXT, "name": "", "shelf": "own", "run": "a"}
    assert server["list_cards"]({}) == {"cards": known}
    for chosen, device in (([1], "cuda:1"), ([1, 0], "cuda:0,1")):
        assert "error" not in server["start_run"](asked | {"cards": chosen, "queued": True})
        assert started.pop() == (TEXT + f'\n[memory]\ndevice = "{device}"\n', "a", True)
    assert server["start_run"](asked | {"cards": [0, 2]})["error"] == "there is no GPU 2 here; reload the page"


def test_what_is_put_in_the_queue_waits_also_when_nothing_is_on(jobs, monkeypatch):
    monkeypatch.setattr(jobs, "serve_queue", lambda: None)
    file = jobs.places.presets / "a.toml"
    file.parent.mkdir(parents=True)
    file.write_text(TEXT)
    assert jobs.start(file, "a", queued=True) and [entry.name for entry in jobs.queue.waiting()] == ["a"]


def test_a_form_change_comes_back_as_text(server):
    change = {"section": "train", "key": "lr", "value": "2e-4"}
    answer = server["check_preset"]({"text": TEXT, "name": "p", "change": change})
    assert answer["text"].splitlines()[-1].startswith("lr = ") and answer["values"]["train"]["lr"] == 2e-4
    assert "text" not in server["check_preset"]({"text": TEXT, "name": "p"})


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "con", "x\0", "a" * 100, "x.toml/..", "C:x", "ä"])
def test_a_preset_is_saved_only_under_a_plain_name(server, jobs, name):
    assert "error" in server["save_preset"]({"text": TEXT, "name": name, "shelf": "own"})
    assert not list(jobs.places.workspace.rglob("*.toml"))


HOSTILE = [None, True, 0, -1, 10**400, 1.5, "", "x", "../../etc/passwd", "/etc/passwd", "..\\..\\x", "a\0b",
           "x" * 10**6, [], ["../x"], {}, {"path": "/etc/passwd"}, float("nan")]


def test_no_function_answers_junk_with_anything_but_a_sentence(server):
    for name, junk in itertools.product(server, [junk for junk in HOSTILE if junk != {}]):
        answer = server[name](junk)
        assert set(answer) == {"error"} and len(answer["error"]) < 500, (name, junk)


FIELDS = {
    "list_runs": ["seen"], "read_run": ["run", "cursor", "word"], "order_run": ["run", "order", "prompts"],
    "resume_run": ["run"], "open_preset": ["shelf", "name"], "check_preset": ["text", "name", "change"],
    "save_preset": ["text", "name", "shelf", "replace"], "start_run": ["text", "name", "shelf", "run"],
    "delete_preset": ["name"], "restore_preset": ["thrown"], "use_base": ["text", "base"],
    "read_hard": ["run", "most"], "read_spectrum": ["run", "block", "step"], "save_notes": ["run", "text", "before"],
    "pin_checkpoint": ["run", "step", "pinned"], "branch_run": ["run", "step", "branch", "changes"],
    "rename_run": ["run", "new"], "delete_run": ["run"], "restore_run": ["entry"],
    "list_presets": [], "start_demo": [], "order_queue": ["run", "order"], "list_sets": [],
}
FINE = {"thrown": "x", "base": "x", "seen": "", "run": "r", "cursor": "", "word": "", "order": "stop", "prompts": [],
        "shelf": "own", "name": "n",
        "text": TEXT, "change": None, "replace": False, "most": 5, "block": "up", "step": 5, "before": "x",
        "pinned": True, "branch": "", "changes": [], "new": "../r", "entry": "x"}


def test_one_hostile_field_gets_a_sentence_and_leaves_no_file(server, jobs):
    ours = run.create(jobs.places.workspace, "r", TEXT)
    before = sorted(jobs.places.workspace.rglob("*"))
    for name, fields in FIELDS.items():
        for field, value in itertools.product(fields, HOSTILE):
            names = ("save_preset", "start_run", "resume_run", "rename_run")
            if name in names and value in ("", "x", True) or value in ([], None):
                continue  # a fair value there
            answer = server[name]({**{key: FINE[key] for key in fields}, field: value})
            json.dumps(answer)
            if name not in ("check_preset", "list_runs", "read_run", "save_notes"):
                assert "error" in answer, (name, field, value)
    assert "error" in server["list_runs"]({"seen": "", "more": 1})
    assert sorted(jobs.places.workspace.rglob("*")) == before and ours.preset.read_text() == TEXT


def test_an_order_that_does_not_exist_is_refused(server, jobs):
    run.create(jobs.places.workspace, "r", TEXT)
    for order in ("delete", "../stop", "STOP", ""):
        assert "error" in server["order_run"]({"run": "r", "order": order})
    assert list((jobs.places.runs / "r" / "control").iterdir()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(FINE)), inner, max_size=4))))
def test_whatever_is_sent_comes_back_as_an_object(server, data):
    for name in ("read_run", "check_preset", "open_preset", "list_runs", "order_run"):
        assert isinstance(server[name](data), dict)


def test_text_that_is_no_preset_at_all_has_faults_and_no_crash(server):
    for text in ("", "\0", "[model]\nfamily = 3", "model = 1", "[a.b.c]\nx=1", "version = 99", "[train]\nlr = nan",
                 "[[model]]\nx = 1", "x" * 1000, "[model]\nbase = 2024-01-01",
                 "[train]\nsteps = 99999999999999999999999"):
        answer = server["check_preset"]({"text": text, "name": "p"})
        assert answer["problems"], text
        json.dumps(answer, allow_nan=False)
