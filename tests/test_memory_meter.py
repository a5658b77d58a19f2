"""How much memory there is for a run, and that no run takes more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.test_loop import events
from tests.test_memory_probe import QUIET
from trainer import preset as presets
from trainer import run as runs
from trainer.errors import UserError
from trainer.loop import run_training
from trainer.memory import meter
from trainer.memory.meter import CONTEXT, GIB, KERNELS, GpuMeter, available, meter_of

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch) -> dict[str, float]:
    """Pretends a GPU of 12 GiB, of which a program took some and this process another part."""
    facts = {"free": 9.0, "total": 12.0, "ours": 1.0}
    monkeypatch.setattr(meter.torch.cuda, "mem_get_info",
                        lambda device: (int(facts["free"] * GIB), int(facts["total"] * GIB)))
    monkeypatch.setattr(meter.torch.cuda, "memory_reserved", lambda device: int(facts["ours"] * GIB))
    return facts


@pytest.mark.parametrize(("budget", "room"), [(0, 10 * GIB - KERNELS), (24, 10 * GIB - KERNELS), (8, 8 * GIB - CONTEXT),
                                              (10.2, 10.2 * GIB - CONTEXT)])
def test_a_run_gets_what_is_free_and_within_its_budget(card, budget, room) -> None:
    assert available(CUDA, budget) == int(room)


def test_next_to_nothing_is_told_with_the_way_out(card) -> None:
    card |= {"free": 0.1, "ours": 0.0}
    with pytest.raises(UserError, match="^only 0.1 of 12.0 GiB of GPU memory are free: close other programs"):
        available(CUDA, 0)
    card["free"] = 9.0
    with pytest.raises(UserError, match="memory.budget_gb = 0.5 leaves 0.0 of them: close other programs that use the "
                                        "GPU, or raise the budget"):
        available(CUDA, 0.5)


def test_a_cpu_has_no_meter() -> None:
    assert meter_of(torch.device("cpu"), 8) is None


@pytest.fixture
def uncapped() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_budget_cannot_be_exceeded_and_the_peak_is_counted(uncapped) -> None:
    torch.zeros(1, device=CUDA)
    small = GpuMeter(CUDA, 3.0)
    assert small.limit == int(3.0 * GIB - CONTEXT)  # 2 GiB, of which something is held
    torch.cuda.empty_cache()
    small.restart()
    before = small.peak()
    held = torch.empty(GIB, dtype=torch.uint8, device=CUDA)
    assert before + GIB <= small.peak() < before + 1.1 * GIB
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(GIB, dtype=torch.uint8, device=CUDA)
    del held
    small.restart()
    assert small.peak() < GIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu_tells_its_measured_peak_and_the_next_one_knows_it(tiny_project, tmp_path, uncapped) -> None:
    for how in ("Measured peak", "As measured in an earlier run like this."):
        preset = presets.load(tiny_project, [*QUIET, "memory.budget_gb=4", "memory.device=cuda:0"])
        run = runs.create(tmp_path, runs.free_name(tmp_path, "run"), presets.dumps(preset))
        run_training(run, preset, tmp_path)
        (note,) = (event["text"] for event in events(run, "note") if event["text"].startswith("Memory: "))
        assert note.startswith("Memory: 3.0 GiB. Chosen: unquantised, no checkpointing. ") and how in note
