"""The table of a comparison: means over seeds, how sure they are, and what the difference to the best is worth."""

import pytest

from tests.run_folders import finished
from trainer import comparison, facts, measures


def rows_of(tmp_path, *runs):
    known = [facts.collect(finished(tmp_path, name, *overrides, **measured)) for name, overrides, measured in runs]
    return measures.table(known, comparison.compare(known))


def seeds(rank, losses, kids=()):
    return [(f"r{rank}s{seed}", [f"adapter.rank={rank}", f"train.seed={seed}"],
             {"validation": loss, "kid": (kids[seed], kids[seed] - 5, kids[seed] + 5) if kids else None})
            for seed, loss in enumerate(losses)]


def test_runs_of_a_setting_share_a_row_with_their_mean_and_its_interval(tmp_path):
    lower, higher = rows_of(tmp_path, *seeds(4, [0.10, 0.12, 0.14]), *seeds(8, [0.20, 0.22, 0.24]))
    assert (lower.name, lower.runs) == ("rank 4", ["r4s0", "r4s1", "r4s2"])
    cell = lower.cells["validation"]
    assert cell.value == pytest.approx(0.12) and cell.text == "0.12"
    assert cell.spread == "± 0.05 (3 seeds)"  # 4.303 · 0.02 / √3
    assert (cell.verdict, cell.kind) == ("lowest", "best")
    assert (higher.cells["validation"].verdict, higher.cells["validation"].kind) == ("higher than rank 4", "worse")
    assert lower.cells["kid"].value is None and lower.cells["kid"].text == "–"
    assert [lower.cells[key].text for key in ("memory", "file", "time", "sec", "rank")] == [
        "4 GB", "4 kB", "60 s", "0.5", "4"]


def test_a_seed_counts_once_and_a_run_that_broke_off_not_beside_those_that_are_over(tmp_path):
    again = ("again", ["adapter.rank=4", "train.seed=0"], {"validation": 0.10})
    broken = finished(tmp_path, "broken", "adapter.rank=4", "train.seed=2", validation=0.9, steps=50)
    broken.events.write_bytes(b"\n".join(broken.events.read_bytes().split(b"\n")[:-2]) + b"\n")  # no end
    known = [facts.collect(finished(tmp_path, name, *overrides, **measured))
             for name, overrides, measured in [*seeds(4, [0.10, 0.12]), again]]
    [row] = measures.table([facts.collect(broken), *known], [])
    assert len(row.runs) == 4 and row.cells["validation"].value == pytest.approx(0.11)
    assert row.cells["validation"].spread.endswith("(2 seeds)")


def test_what_is_no_difference_or_unknown_is_said_so(tmp_path):
    rows = rows_of(tmp_path, *seeds(4, [0.10, 0.12], (20, 30)), *seeds(8, [0.11, 0.10], (21, 22)))
    assert rows[0].cells["validation"].verdict == "no difference shown"  # 0.11 against 0.105
    one, other = rows_of(tmp_path / "b", *seeds(4, [0.1], (20,)), *seeds(8, [0.2], (90,)))
    assert other.cells["validation"].verdict == "cannot be told yet"
    assert one.cells["kid"].spread == "15 to 25" and other.cells["kid"].kind == "worse"


def test_the_front_is_of_the_best_measure_of_quality_that_two_settings_have(tmp_path):
    rows = rows_of(tmp_path, *seeds(4, [0.1], (20,)), *seeds(8, [0.2], (10,)))
    quality, points = measures.pareto(rows, "time")
    assert quality == "kid" and [(point.name, point.is_front) for point in points] == [("r4s0", False), ("r8s0", True)]
    assert measures.pareto(rows_of(tmp_path / "b", *seeds(4, [0.1]), *seeds(8, [0.2], (9,))), "time")[0] == "validation"
    assert measures.pareto(rows[:1], "memory") == ("", [])
