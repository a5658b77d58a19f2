"""What is remembered of earlier runs, and what a device without a memory of its own is spared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import nn

from tests import projects
from trainer import checkpoint
from trainer.errors import UserError
from trainer.memory import plan
from trainer.memory.choice import remembered
from trainer.memory.plan import Plan

LADDER = [Plan(), Plan(checkpointing="full"), Plan("nf4", "full")]
KNOWN = {"plan": asdict(LADDER[1]), "peak": 70, "limit": 100, "ladder": plan.LADDER}


@pytest.mark.parametrize(("known", "limit", "plans"), [
    (KNOWN, 100, LADDER[1:]), (KNOWN, 75, LADDER[1:]), (KNOWN, 109, LADDER[1:]),
    (KNOWN, 72, []), (KNOWN, 120, []),
    (KNOWN | {"plan": asdict(Plan("fp8"))}, 100, []),
    (None, 100, []), ({}, 100, []), ({"sec": 1.0, "vram_peak": 5}, 100, []), (KNOWN | {"plan": {"bits": 4}}, 100, []),
    (KNOWN | {"peak": None}, 100, []), ([1], 100, []), (KNOWN | {"ladder": 1}, 100, []),
], ids=["the same", "less, but enough", "a little more", "too little", "much more", "not on the ladder", "nothing",
        "empty", "time only", "another plan", "no peak", "no entry", "an older ladder"])
def test_an_earlier_choice_counts_while_the_memory_is_about_the_same(known, limit, plans) -> None:
    assert remembered(known, LADDER, limit) == plans


def test_on_a_cpu_nothing_is_saved_that_was_not_asked_for(tiny_project, tmp_path) -> None:
    assert projects.session(tiny_project, tmp_path).plan == Plan()
    chosen = projects.session(tiny_project, tmp_path, "memory.gradient_checkpointing=full", name="chosen")
    assert chosen.plan == Plan(checkpointing="full") and chosen.denoiser.is_gradient_checkpointing


@pytest.mark.parametrize(("stored", "held"), [({}, Plan(checkpointing="full")),
                                              (asdict(Plan("int8", "full")), Plan("int8", "full"))])
def test_a_resume_holds_the_model_as_the_checkpoint_says(tiny_project, tmp_path, stored, held) -> None:
    first = projects.session(tiny_project, tmp_path, "memory.gradient_checkpointing=full")
    first.progress.step, first.progress.plan = 1, stored
    checkpoint.save(first.run, first.progress, first.adapter.state_dict(), first.optimizer.state_dict())
    again = projects.session(tiny_project, tmp_path, "memory.gradient_checkpointing=full")
    assert again.plan == held and again.progress.plan == asdict(held)


def test_a_resume_that_does_not_fit_asks_for_nothing_that_nobody_chose(tiny_project, tmp_path, monkeypatch) -> None:
    first = projects.session(tiny_project, tmp_path)
    first.progress.step, first.progress.plan = 1, asdict(Plan("fp8", "full", 15))
    checkpoint.save(first.run, first.progress, first.adapter.state_dict(), first.optimizer.state_dict())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(first.family, "load_denoiser", too_large(first.family.load_denoiser))
    with pytest.raises(UserError, match="the GPU's memory is too small"):
        projects.session(tiny_project, tmp_path)


def too_large(load: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A model that does not fit in 8 bits."""

    def loaded(base: object, device: torch.device, dtype: torch.dtype, *quantize: str) -> nn.Module:
        if "fp8" in quantize:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(base, device, dtype, *quantize)

    return loaded


def test_offloading_from_a_cpu_is_refused(tiny_project, tmp_path) -> None:
    with pytest.raises(UserError, match=r"memory.offload_blocks = 3: this run would train on a device without memory"):
        projects.session(tiny_project, tmp_path, "memory.offload_blocks=3")
    with pytest.raises(UserError, match="memory.offload_blocks = 16: this model has 16 blocks, of which at most 15"):
        projects.session(tiny_project, tmp_path, "memory.offload_blocks=16", name="more")


def test_a_warm_up_longer_than_all_epochs_is_refused(tiny_project, tmp_path) -> None:
    with pytest.raises(UserError, match="train.warmup_steps = 9: the whole training has 8 steps"):
        projects.session(tiny_project, tmp_path, "train.epochs=2", "train.warmup_steps=9")
