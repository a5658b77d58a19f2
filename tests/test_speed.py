"""What this machine remembers of how fast it trained."""

import io
import json
from dataclasses import asdict

import pytest
import torch

from trainer import check, files, preset, speed
from trainer import run as runs
from trainer.memory.plan import LADDER, Plan
from trainer.record import Recorder

TEXT = '[model]\nfamily = "sd15"\nbase = "owner/base"\n[data]\nfolder = "d"\n[train]\nsteps = 10\n'
CPU = torch.device("cpu")


@pytest.fixture
def remember(tmp_path):
    """Remembers that work under these overrides took these seconds a step."""
    recorders = []

    def remember(seconds: list[float], *overrides: str) -> None:
        run = runs.create(tmp_path, f"run{len(recorders)}", "")
        recorder = Recorder(run, tensorboard=False, terminal=io.StringIO())
        recorders.append(recorder)
        for step, sec in enumerate(seconds, 1):
            recorder.step(step, 10, loss=1.0, lr=1.0, grad_norm=1.0, sec=sec, vram=None, vram_peak=None,
                          ram=2**30)
        speed.remember(tmp_path, preset.parse(TEXT, "p", overrides), CPU, recorder.seconds_per_step())

    yield remember
    for recorder in recorders:
        recorder.close()


def recall(workspace, *overrides: str, device: str = speed.device_name(CPU)) -> dict | None:
    return speed.recall(workspace, preset.parse(TEXT, "p", overrides), device)


def test_nothing_is_known_before_the_first_run(tmp_path, remember):
    assert recall(tmp_path) is None
    remember([])
    assert recall(tmp_path) is None and not (tmp_path / "cache").exists()


def test_the_same_work_is_recalled_whatever_does_not_change_its_speed(tmp_path, remember):
    remember([0.5, 0.75, 9.0])
    for overrides in ([], ["train.lr=1e-5"], ["train.steps=99"], ["data.folder=other"], ["sample.every=3"]):
        assert recall(tmp_path, *overrides) == {"sec": 0.75, "vram_peak": None}


def test_what_several_gpus_took_together_is_not_told_of_one(tmp_path):
    named = preset.parse(TEXT, "p", ["memory.device=cuda:0,1"])
    speed.remember(tmp_path, named, CPU, 0.5, gpus=2)
    assert recall(tmp_path) is None
    alone, both = (check.Report(facts={"steps": 10}) for _ in range(2))
    check._time(preset.parse(TEXT, "p", []), tmp_path, CPU, alone)
    check._time(named, tmp_path, CPU, both)
    assert alone.facts["time"].startswith("unknown") and both.facts["time"] == "0.50 s/it, 5 s in all"


@pytest.mark.parametrize("override", [
    "model.base=owner/other", "data.resolution=768", "train.batch_size=2", "train.grad_accum=2", "train.precision=bf16",
    "adapter.method=lora", "adapter.rank=8", "adapter.dora=true", 'adapter.targets=["feed_forward"]',
    "memory.gradient_checkpointing=full", "memory.quantize=nf4", "memory.offload_blocks=2"])
def test_other_work_is_not(tmp_path, remember, override):
    remember([0.5])
    assert recall(tmp_path, override) is None
    remember([2.0], override)
    assert (recall(tmp_path)["sec"], recall(tmp_path, override)["sec"]) == (0.5, 2.0)


def test_a_plan_is_remembered_beside_the_time(tmp_path, remember):
    plan = Plan("nf4", "full", 8)
    speed.remember_plan(tmp_path, preset.parse(TEXT, "p"), speed.device_name(CPU), plan, peak=7, limit=8)
    known = {"plan": asdict(plan), "peak": 7, "limit": 8, "ladder": LADDER}
    assert recall(tmp_path) == known
    remember([0.5])
    assert recall(tmp_path) == known | {"sec": 0.5, "vram_peak": None}
    assert recall(tmp_path, "memory.budget_gb=6") is None


def test_nor_is_work_on_another_device(tmp_path, remember):
    remember([0.5])
    assert recall(tmp_path, device="NVIDIA H200") is None


def test_the_newest_time_counts(tmp_path, remember):
    remember([0.5])
    remember([0.25])
    assert recall(tmp_path)["sec"] == 0.25
    assert len(json.loads((tmp_path / "cache" / "speed.json").read_text())) == 1


@pytest.mark.parametrize("content", [b"", b"{oops", b"[1]", b"\xff\xfe"])
def test_a_damaged_memory_is_no_memory(tmp_path, remember, content):
    files.write_atomic(tmp_path / "cache" / "speed.json", content)
    assert recall(tmp_path) is None
    remember([0.5])
    assert recall(tmp_path)["sec"] == 0.5
