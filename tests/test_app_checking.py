"""A check runs beside the app, one at a time, is known by its text, and ends when nobody waits for it."""

import sys
import time
from pathlib import Path

import pytest

from app import checking
from app.checking import Checks
from app.paths import Places
from tests import projects
from trainer.errors import UserError

STAND_IN = (sys.executable, str(Path(__file__).parent / "app_trainer.py"))
TEXT = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = 3\nbatch_size = {}\n'


@pytest.fixture
def checks(tmp_path):
    return Checks(Places(tmp_path), STAND_IN)


def result(checks, key, seconds=180.0):
    end = time.monotonic() + seconds
    while (answer := checks.read(key))["state"] in ("waiting", "running"):
        assert time.monotonic() < end, answer
        time.sleep(0.02)
    return answer


def test_the_report_is_found_among_what_libraries_say_and_kept(checks, tmp_path):
    key = checks.begin(TEXT.format(1), "mine", tmp_path)
    answer = result(checks, key)
    assert answer["report"]["facts"]["training images"] == 24 and answer["report"]["errors"] == []
    assert answer["report"]["numbers"]["limit"] == 22 * 2**30
    assert checks.begin(TEXT.format(1), "mine", tmp_path) == key and checks.read(key) == answer
    checks.begin(TEXT.format(1), "mine", tmp_path, again=True)
    assert checks.read(key)["state"] == "running"
    assert result(checks, key)["at"] > answer["at"]
    assert not list((tmp_path / "cache/checks").iterdir())


@pytest.mark.parametrize("name", ["{}/mine", "../../../presets/mine"])
def test_a_name_is_for_messages_only_and_no_file_is_written_by_it(checks, tmp_path, name):
    mine = tmp_path / "presets" / "mine.toml"
    mine.parent.mkdir()
    mine.write_text("# mine")
    answer = result(checks, checks.begin(TEXT.format(1), name.format(mine.parent), tmp_path))
    assert mine.read_text() == "# mine" and answer["report"]["facts"]


def test_one_is_looked_at_at_a_time_and_one_that_is_stopped_makes_room(checks, tmp_path):
    slow, next_one = (checks.begin(TEXT.format(batch), "a", tmp_path) for batch in (64, 1))
    assert (checks.read(slow)["state"], checks.read(next_one)["state"]) == ("running", "waiting")
    process = checks._checks[slow].launch.process
    checks.stop(slow)
    assert process.poll() is not None and checks.read(slow) == {"state": "unknown"}
    assert result(checks, next_one)["state"] == "done"
    checks.stop(next_one)  # what is known stays
    assert checks.read(next_one)["state"] == "done"


def test_one_that_no_page_asks_for_is_stopped(checks, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "FORGOTTEN", 0.1)
    slow = checks.begin(TEXT.format(64), "a", tmp_path)
    process = checks._checks[slow].launch.process
    time.sleep(0.2)
    monkeypatch.setattr(checking, "FORGOTTEN", 15.0)
    checks._checks[slow].asked -= 20
    key = checks.begin(TEXT.format(1), "a", tmp_path)
    assert process.poll() is not None and result(checks, key)["state"] == "done"


def test_what_breaks_is_told_in_the_report(checks, tmp_path):
    report = result(checks, checks.begin(TEXT.format(9), "odd", tmp_path))["report"]
    assert report["errors"][0].startswith("odd.toml could not be checked") and "the check broke" in report["errors"][0]


def test_a_text_with_faults_is_refused_at_once(checks, tmp_path):
    with pytest.raises(UserError, match="mine.toml:7: train.steps: should be"):
        checks.begin(TEXT.replace("steps = 3", "steps = 0").format(1), "mine", tmp_path)
    assert checks._checks == {}


def test_the_trainers_own_check_is_understood(tmp_path):
    file = projects.make(tmp_path / "project")
    checks = Checks(Places(tmp_path / "w"))
    report = result(checks, checks.begin(file.read_text(), "real", file.parent))["report"]
    assert report["errors"] == [] and report["facts"]["training images"] > 0 and report["numbers"]["host"] > 0
