"""What `--check` says of a step's memory, against what was measured on a GPU (`tests/bench/memory_h200.jsonl`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.memory import FIRST, GIB, SHOWN, TARGETS, Predictions, grid, rows_of

ROWS = rows_of([Path(__file__).parent / "bench" / "memory_h200.jsonl"])
OURS = {row["name"]: row for row in ROWS if not row["peer"]}


@pytest.fixture(scope="module")
def predict() -> Predictions:
    return Predictions()


@pytest.mark.parametrize("name", OURS)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(predict: Predictions, name: str) -> None:
    assert predict(OURS[name]) == pytest.approx(OURS[name]["peak"], rel=0.1)


def test_every_model_was_measured_in_each_way_to_hold_it_and_kept_its_limit() -> None:
    wanted = {f"{size}:{quantize}:{mode}" for size in SHOWN for quantize in ("none", "fp8", "nf4")
              for mode in ("full", "offload")}
    assert wanted <= OURS.keys() and set(FIRST) <= {row["name"] for row in ROWS}
    assert all(row["finite"] for row in ROWS)
    assert {name: OURS[name]["peak"] <= limit * GIB for name, limit in TARGETS.items()} == dict.fromkeys(TARGETS, True)


def test_the_presets_page_shows_the_measured_figures() -> None:
    page = (Path(__file__).parents[1] / "presets" / "README.md").read_text()
    for line in grid(ROWS).splitlines():
        assert line in page
