"""The step-time bench: its cases, its table, and that ours and the peer's losses agree from the same start."""

from __future__ import annotations

import argparse

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
    assert step_time.line({"name": "sd15:1 lora", "error": "over 9 s"}, rows) == "| sd15:1 lora | over 9 s |"
