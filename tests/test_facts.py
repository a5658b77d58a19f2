"""What is read from a run's folder is what the run said, and still holds."""

import re
import time
from datetime import UTC, datetime

import pytest

from tests.run_folders import finished
from trainer import facts
from trainer.errors import UserError
from trainer.events import EventWriter
from trainer.report import card


def test_a_list_entry_says_where_a_run_is(tmp_path):
    seen = facts.overview(finished(tmp_path, "a", "adapter.method=stiefel"))
    assert (seen.name, seen.state, seen.step, seen.steps, seen.method) == ("a", "done", 100, 100, "stiefel")
    assert seen.sec == 0.5 and seen.loss == pytest.approx(sum(1 / step for step in range(51, 101)) / 50)
    assert abs(seen.started - time.time()) < 60


def test_all_facts_of_a_run(tmp_path):
    run = finished(tmp_path, "a", "train.seed=7", validation=0.25, kid=(14.0, 4.0, 24.0))
    (run.exports).mkdir()
    known = facts.collect(run)
    assert known.first_validation["loss"] == pytest.approx(0.3) and known.validation["loss"] == 0.25
    assert known.best_validation["step"] == 100 and known.distance["kid_high"] == 24.0
    assert (known.peak_vram, known.peak_ram, known.trained_sec) == (4 * 10**9, 10**9 + 100, 60.0)
    assert facts.mean_rank(known) == 4.0 and facts.result_of(known).bytes == 4000
    assert known.device == "CPU, torch 2.13.0, box" and known.preset["train"]["seed"] == 7


def test_what_a_resume_voided_is_not_a_fact(tmp_path):
    run = finished(tmp_path, "a", validation=0.25, kid=(14.0, 4.0, 24.0))
    events = EventWriter(run.events)
    events.write("start", step=60, steps=100)
    events.write("step", step=61, steps=100, loss=9.0, sec=0.5)
    known = facts.collect(run)
    assert known.distance is None and known.validation["step"] == 50 and known.rank is None
    assert facts.overview(run).state == "crashed"


def test_a_run_that_has_said_nothing_has_no_facts_and_no_fault(tmp_path):
    run = finished(tmp_path, "a")
    run.events.unlink()
    run.result.unlink()
    known = facts.collect(run)
    assert known.overview.state == "new" and known.overview.loss is None and known.exports == []
    assert known.validation is None and facts.mean_rank(known) is None and facts.result_of(known) is None


def test_the_nearest_shipped_preset_and_what_differs_from_it(tmp_path):
    known = facts.collect(finished(tmp_path, "a", "adapter.rank=5"))
    assert known.like == "the defaults" and known.differences == {"adapter.rank": [16, 5]}
    from trainer import preset as presets

    run = finished(tmp_path, "b")
    presets.save(run.preset, presets.dumps(presets.load(presets.SHIPPED / "demo.toml", ["train.steps=17"])))
    known = facts.collect(run)
    assert known.like == "demo" and list(known.differences) == ["train.steps"]
    assert known.differences["train.steps"][1] == 17


def test_a_run_is_found_by_name_or_folder_and_a_slip_gets_the_nearest(tmp_path):
    run = finished(tmp_path, "my style")
    assert facts.find_run(tmp_path, "my style").path == facts.find_run(tmp_path, str(run.path)).path == run.path
    with pytest.raises(UserError, match="no run called 'mystyle'.*did you mean my style?"):
        facts.find_run(tmp_path, "mystyle")
    with pytest.raises(UserError, match="the newest are: my style"):
        facts.find_run(tmp_path, "zzz")
    with pytest.raises(UserError, match="has none yet"):
        facts.find_run(tmp_path / "elsewhere", "a")
    for name in ("..", "../runs/my style", "."):
        with pytest.raises(UserError, match="no run called"):
            facts.find_run(tmp_path, name)


def test_hundreds_of_runs_are_listed_without_reading_their_events_whole(tmp_path):
    run = finished(tmp_path, "a", steps=20_000)
    begun = time.perf_counter()
    for _ in range(20):
        facts.overview(run)
    assert time.perf_counter() - begun < 1.0


def test_a_run_that_cannot_be_read_stands_in_the_list_beside_the_others(tmp_path):
    broken = finished(tmp_path, "broken")
    broken.events.unlink()
    broken.events.mkdir()
    row = facts.overview(broken)
    assert row.state == "failed" and "cannot be read" in row.text and facts.best_of(broken) is None


@pytest.mark.parametrize("told", ["1e30", "-1e30", "NaN", "Infinity", '"now"', "true"])
def test_a_time_that_is_none_gives_way_to_that_of_the_preset(tmp_path, trainer, told):
    run = finished(tmp_path, "a")
    lines = run.events.read_text().splitlines()
    lines = [re.sub('"t": ?[^,]+', lambda _: f'"t":{told}', line) for line in lines]
    run.events.write_text("\n".join(lines) + "\n")
    assert run.events.read_text().count(f'"t":{told}') == len(lines)
    started = datetime.fromtimestamp(run.preset.stat().st_mtime, UTC)
    assert facts.overview(run).started == run.preset.stat().st_mtime
    assert f"{started:%Y-%m-%d}" in card.make(run)
    assert trainer("list", "--workspace", tmp_path).code == trainer("show", "a", "--workspace", tmp_path).code == 0


def test_an_event_that_lies_too_deep_is_passed_over(tmp_path):
    run = finished(tmp_path, "a")
    with open(run.events, "a") as file:
        file.write("[" * 99_999 + "\n")
    assert facts.collect(run).overview.state == "done"
