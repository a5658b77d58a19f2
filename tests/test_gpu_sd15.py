"""SD 1.5 at its true size, with random weights, on a real GPU: 50 steps of the real command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import models, projects
from trainer.events import EventReader
from trainer.run import Run

STEPS = 50

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(scope="module")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose base has SD 1.5's own sizes."""
    folder = tmp_path_factory.mktemp("true")
    models.sd15_folder(folder / "base", true_size=True)
    return projects.make(folder)


@pytest.mark.parametrize("method", ["lora", "stiefel", "stella"])
def test_true_size_trains_with_a_finite_loss(true_size: Path, tmp_path: Path, method: str) -> None:
    command = [sys.executable, "-m", "trainer", "--preset", str(true_size), "--workspace", str(tmp_path)]
    command += ["--name", method]
    for change in (f"adapter.method={method}", "adapter.rank=16", f"train.steps={STEPS}", "train.batch_size=4",
                   "data.resolution=512", "train.ema_decay=0.99", "evaluate.every=0", "output.save_every=0"):
        command += ["--set", change]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    run = Run(tmp_path / "runs" / method)
    assert done.returncode == 0, done.stderr + run.log_tail()
    events = EventReader(run.events).read()
    steps = [event for event in events if event["kind"] == "step"]
    assert len(steps) == STEPS and all(event["loss"] is not None for event in steps)
    warm = sorted(event["sec"] for event in steps[10:])
    start, first = events[0], steps[0]
    print(f"\n{method}: {warm[len(warm) // 2]:.4f} s/it (median of {len(warm)}), "
          f"peak {steps[-1]['vram_peak'] / 2**30:.2f} GiB, "
          f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}, first step after {first['t'] - start['t']:.1f} s, "
          f"{start['device']}, torch {start['torch']}")
    (export,) = [event for event in events if event["kind"] == "export" and event["path"] == f"{method}.safetensors"]
    assert export["unmatched"] == [] and export["worst_rel_error"] < 2e-3


@pytest.mark.parametrize("budget", [4.0, 7.0])
def test_a_run_stays_within_its_budget(true_size: Path, tmp_path: Path, budget: float) -> None:
    """What the driver says the process takes, its context and libraries among it, from loading to the last picture."""
    command = [sys.executable, "-m", "trainer", "--preset", str(true_size), "--workspace", str(tmp_path)]
    command += ["--name", "small"]
    for change in (f"memory.budget_gb={budget}", "adapter.method=stella", "adapter.rank=16", "train.steps=12",
                   "train.batch_size=4", "data.resolution=512", "evaluate.every=6", "output.save_every=6"):
        command += ["--set", change]
    before = used_memory()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent.parent)
    most = 0
    while process.poll() is None:
        most = max(most, used_memory() - before)
        time.sleep(0.05)
    run = Run(tmp_path / "runs" / "small")
    assert process.returncode == 0, process.stderr.read() + run.log_tail()
    events = EventReader(run.events).read()
    peak = max(event["vram_peak"] for event in events if event["kind"] == "step")
    print(f"\nbudget {budget:.1f} GiB: the driver saw {most / 2**30:.2f} GiB at most, tensors {peak / 2**30:.2f} GiB; "
          + "; ".join(event["text"] for event in events if event["kind"] == "note"))
    assert most <= budget * 2**30


def used_memory() -> int:
    """Bytes of the first GPU's memory in use, by the driver's own account."""
    asked = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) * 2**20
