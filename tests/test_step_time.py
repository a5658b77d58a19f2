"""The step-time bench: its cases, its table, and that ours and the peer's losses agree from the same start."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.bench import step_time

TINY = argparse.Namespace(device="cpu", warm=1, steps=2, profile=False)


@pytest.mark.parametrize("case", ["sd15:2", "flux1-dev:1:full"])
def test_losses_agree_with_the_peers_over_twenty_steps(case: str) -> None:
    [row] = step_time.rows_of(case, ["lora"])
    found = step_time.agree(row, TINY)
    assert len(found["ours"]) == step_time.AGREE_STEPS and len(set(found["ours"])) > 10
    assert found["agree"] <= step_time.AGREE
    assert abs(found["ours"][0] / found["theirs"][0] - 1) < 1e-5


def test_a_case_says_model_batch_checkpointing_and_weights() -> None:
    [row] = step_time.rows_of("klein-4b:2:full:nf4", ["stella+eager"])
    assert (row.size, row.batch, row.checkpointing, row.quantize) == ("klein-4b", 2, "full", "nf4")
    assert row.name == "klein-4b:2:full:nf4 stella+eager" and row.flags() == ["eager"]
    assert [row.who for row in step_time.rows_of("sd15:4=peer,lora+graph", ["stella"])] == ["peer", "lora+graph"]
    assert [step_time.rows_of(case, ["peer"])[0].case for case in ("sd15:4", "sd15:4:selective")] == [
        "sd15:4", "sd15:4:full"]


@pytest.mark.parametrize("case, who", [("sd15", "lora"), ("sd99:1", "lora"), ("sd15:x", "lora"),
                                       ("sd15:1:half", "lora"), ("sd15:1", "someone"), ("sd15:1", "lora+faster")])
def test_what_is_no_case_is_refused(case: str, who: str) -> None:
    with pytest.raises(SystemExit, match="there is no case"):
        step_time.rows_of(case, [who])


def test_ratios_are_of_the_peers_plain_row_of_the_same_work() -> None:
    rows = []
    for who in ("peer", "lora"):
        [row] = step_time.rows_of("sd15:1", [who])
        rows.append(step_time.measure(row, TINY))
    assert rows[0]["flop"] > 1e8 and rows[0]["ceiling"] > 1e6
    rows[0]["sec"], rows[1]["sec"] = 0.3, 0.1
    assert step_time.line(rows[1], rows).endswith("| 3.00 |")
    assert step_time.line(rows[0], []).endswith("| 1.00 |")
    assert step_time.line({"name": "sd15:1 lora", "error": "over 9 s"}, rows) == "| sd15:1 lora | over 9 s |"


def test_a_table_measures_each_row_by_the_peer_of_its_own_run(tmp_path: Path) -> None:
    """Runs added to one file one after the other, by one program that noted them and one that did not; two files."""
    row = asdict(step_time.rows_of("sd15:1", ["peer"])[0]) | {
        "case": "sd15:1", "secs": [1.0], "peak": 0, "reserved": 0, "first_sec": 1.0, "flop": 1.0, "ceiling": 1.0}

    def noted(name: str, *rows: tuple[str | None, str, float]) -> Path:
        (tmp_path / name).write_text("".join(
            json.dumps(row | {"who": who, "sec": sec} | ({"run": run} if run else {})) + "\n"
            for run, who, sec in rows))
        return tmp_path / name

    one = noted("one", (None, "peer", 4.0), (None, "lora", 2.0), (None, "peer", 6.0), (None, "lora", 2.0))
    two = noted("two", ("a", "lora", 2.0), ("a", "peer", 8.0), ("a", "lora", 2.0), ("b", "lora", 2.0))
    ratios = [text.split("|")[-2].strip() for text in step_time.table([one, two])]
    assert ratios == ["1.00", "2.00", "1.00", "3.00", "", "1.00", "4.00", ""]
