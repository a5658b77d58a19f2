"""A lasting slow-down is told once, and what is likely to blame."""

from __future__ import annotations

import pytest
import torch

from trainer.memory.meter import GIB
from trainer.memory.pace import COLD, LAST, WARM, Pace, explain, likely_cause

START = [9.0] * COLD + [1.0] * WARM  # the first steps are slow, and count for nothing


def told(seconds: list[float]) -> list[tuple[int, float]]:
    """After which of these steps what is told."""
    pace = Pace()
    return [(number, times) for number, sec in enumerate(seconds, 1) if (times := pace.add(sec)) is not None]


def test_a_lasting_slow_down_is_told_once() -> None:
    assert told(START + [1.0] * 30 + [2.0] * 100) == [(len(START) + 30 + LAST // 2 + 1, 2.0)]


@pytest.mark.parametrize("then", [
    [1.6] * 100, [1.0] * 20 + [30.0] + [1.0] * 20, ([1.0] * 12 + [9.0] * 9) * 5, [0.5] * 100, [2.0] * (LAST - 1)],
    ids=["a little slower", "one slow step", "some slow steps", "faster", "not long enough"])
def test_what_is_small_or_passes_is_not_told(then: list[float]) -> None:
    assert told(START + then) == []


def test_a_short_run_tells_nothing() -> None:
    assert told([1.0] * 5 + [9.0] * 10) == []


@pytest.mark.parametrize(("free", "grew", "platform", "said"), [
    (4, 3, "linux", "other programs took 3.0 GiB since the run began: likely they use the GPU too. Close them"),
    (4, 3, "win32", "other programs took 3.0 GiB since"),
    (0.2, 0, "win32", "likely the driver moves memory to the computer's own, which is slow. Set memory.budget_gb"),
    (0.2, 0, "linux", "likely another program computes on this GPU, or it is hot and slows itself down"),
    (6, 0, "win32", "likely another program computes on this GPU"),
])
def test_the_cause_follows_from_the_memory(free: float, grew: float, platform: str, said: str) -> None:
    text = likely_cause(int(free * GIB), 12 * GIB, int(grew * GIB), platform)
    assert text.startswith(f"{free:.1f} of 12.0 GiB of GPU memory are free") and said in text


def test_on_a_cpu_there_is_no_memory_to_blame() -> None:
    assert explain(2.0, 1.5, torch.device("cpu"), 0) == (
        "Steps take 3.00 s now, 2.0 times as long as at first (1.50 s). Likely another program keeps the processor "
        "busy")
