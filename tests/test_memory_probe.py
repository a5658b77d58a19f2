"""The plan that fits is found by measuring, and the run is as if nobody had measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import projects
from tests.test_distributed import Member, outcomes
from tests.test_loop import assert_same_weights, events
from trainer import checkpoint
from trainer import preset as presets
from trainer import run as runs
from trainer.averaging import Averager
from trainer.distributed import World
from trainer.errors import UserError
from trainer.loop import run_training
from trainer.memory import probe
from trainer.memory.estimate import Estimator
from trainer.memory.meter import GIB
from trainer.memory.plan import Plan
from trainer.run import Run
from trainer.session import Session, hold

QUIET = ("sample.prompts=[]", "evaluate.every=0", "log.rank_every=0", "train.steps=2", "output.save_every=0",
         "evaluate.folder=", "memory.quantize=none")
LATE = -1.0  # a plan that runs out of memory after it took its steps
CPU = torch.device("cpu")


class Pretended:
    """A meter that shows what it is told to, one plan after the other; None runs out of memory at once."""

    def __init__(self, limit: float, *peaks: float | None) -> None:
        self.limit, self.peaks, self.asked = int(limit * GIB), list(peaks), 0

    def restart(self) -> None:
        self.asked += 1
        if self.peaks[0] is None:
            self.peak()

    def peak(self) -> int:
        peak = self.peaks.pop(0)
        if peak in (None, LATE):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return int(peak * GIB)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """One cache for all runs, of which only what was measured is forgotten after each test."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(autouse=True)
def forget(workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Estimator, "fits", lambda estimator, plan, room: True)  # which takes long: see its own tests
    yield
    (workspace / "cache" / "speed.json").unlink(missing_ok=True)


def train(preset_file: Path, workspace: Path, meter: Pretended | None, *overrides: str) -> Run:
    preset = presets.load(preset_file, [*QUIET, *overrides])
    run = runs.create(workspace, runs.free_name(workspace, "run"), presets.dumps(preset))
    run_training(run, preset, workspace, measured_by=lambda device, budget: meter)
    return run


def notes(run: Run) -> list[str]:
    return [event["text"] for event in events(run, "note") if event["text"].startswith("Memory: ")]


@pytest.mark.parametrize("chosen", [
    ["adapter.method=stella", "adapter.dropout=0.3"], ["adapter.method=stiefel", "train.grad_accum=2"],
    ["adapter.method=lora", "train.ema_decay=0.9", "adapter.init=pissa", "train.optimizer=scaled_adamw"],
], ids=lambda chosen: chosen[0].split("=")[1] + " " + chosen[1].split("=")[0])
def test_a_run_is_to_the_bit_as_if_nobody_had_measured(tiny_project, workspace, chosen) -> None:
    plain = train(tiny_project, workspace, None, *chosen)
    meter = Pretended(8, LATE, 7)
    probed = train(tiny_project, workspace, meter, *chosen)
    assert meter.asked == 2 and len(notes(probed)) == 1
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_weights(plain.checkpoint(2) / file, probed.checkpoint(2) / file)
    assert [step["loss"] for step in events(plain, "step")] == [step["loss"] for step in events(probed, "step")]


def test_the_first_plan_that_fits_is_taken_and_told_with_what_did_not(tiny_project, workspace) -> None:
    run = train(tiny_project, workspace, Pretended(8, None, 7.8, 7.7, 5.5))
    assert notes(run) == [
        "Memory: 8.0 GiB. Chosen: unquantised, checkpointing, 5 of 16 blocks in system memory. Measured peak 5.5 GiB. "
        "Did not fit: unquantised, no checkpointing (out of memory); unquantised, selective checkpointing (7.8 GiB); "
        "unquantised, checkpointing (7.7 GiB)."]


def test_a_plan_that_fits_at_once_needs_no_other(tiny_project, workspace) -> None:
    run = train(tiny_project, workspace, Pretended(24, 3))
    assert notes(run) == ["Memory: 24.0 GiB. Chosen: unquantised, no checkpointing. Measured peak 3.0 GiB."]


def test_an_encoder_that_is_trained_gets_the_adapter_of_each_plan_anew(tiny_project, workspace, monkeypatch) -> None:
    """It is loaded once; weights that have to be quantised otherwise come with another adapter, as do those after a
    plan whose model was loaded, and did not fit when it was to be held."""

    def holding(family: object, denoiser: object, plan: Plan, device: torch.device) -> object:
        if plan == Plan("fp8", "none"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hold(family, denoiser, plan, device)

    monkeypatch.setattr("trainer.session.hold", holding)
    run = train(tiny_project, workspace, Pretended(8, 9, 9, 9, 3), "memory.quantize=auto",
                'adapter.targets=["attention","text_encoder"]')
    assert notes(run)[0].startswith("Memory: 8.0 GiB. Chosen: FP8, selective checkpointing. Measured peak 3.0 GiB.")
    assert run.last_step() == 2


def test_the_next_run_like_it_measures_no_more_unless_there_is_more_memory(tiny_project, workspace) -> None:
    train(tiny_project, workspace, Pretended(8, None, 7))
    for limit, peaks, asked, how in ((8, [], 0, "As measured in an earlier run like this."),
                                     (16, [9], 1, "Measured peak 9.0 GiB."),
                                     (7, [None, 6.6], 2, "no checkpointing (out of memory).")):
        meter = Pretended(limit, *peaks)
        run = train(tiny_project, workspace, meter, "train.lr=1e-5")
        assert meter.asked == asked and notes(run)[0].endswith(how)


def test_a_resume_holds_the_model_as_before_and_measures_nothing(tiny_project, workspace) -> None:
    run = train(tiny_project, workspace, Pretended(8, None, 7), "train.steps=1")
    meter = Pretended(100)
    run_training(run, presets.load(run.preset, ["train.steps=2"]), workspace, measured_by=lambda *_: meter)
    assert meter.asked == 0 and len(notes(run)) == 1 and run.last_step() == 2
    assert checkpoint.last_progress(run).plan == asdict(Plan(checkpointing="selective"))


def test_too_little_memory_for_every_plan_says_what_is_needed(tiny_project, workspace) -> None:
    with pytest.raises(UserError) as caught:
        train(tiny_project, workspace, Pretended(1, None, None, None, None, None, 5))
    assert str(caught.value) == (
        "the GPU's memory is too small: this run may take 1.0 GiB of it, and even with unquantised, checkpointing, 15 "
        "of 16 blocks in system memory it needs 5.0 GiB. Make data.resolution, train.batch_size or adapter.rank "
        "smaller, choose a smaller model, or leave to auto what [memory] fixes")


def test_measuring_takes_the_largest_pictures_with_the_longest_captions(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "data.caption_dropout=0")
    step = probe.largest_step(session)
    sizes = {session.latents.sizes[draw.item] for draw in session.order.batch(step)}
    assert sizes == {max(session.latents.sizes, key=lambda size: size[0] * size[1])}


def test_what_averages_gradients_is_counted_before_it_is_made(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path)
    assert probe.measure(session, Pretended(8, 1)) == GIB
    session.world = World()
    session.world.size = 2
    averager = Averager(session.world, [leaf.grad for leaf in session.adapter.parameters()], session.seen)
    assert probe.measure(session, Pretended(8, 1)) == GIB + averager.flat.nbytes


def test_a_fault_that_is_not_memory_is_not_taken_for_it(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path)

    def broken(plan: Plan) -> Session:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probe.settle(broken, [Plan()], 1, Pretended(1), session.recorder)


@pytest.mark.parametrize(("limit", "first"), [(100, "a"), (9.5, "a"), (8, "b"), (2, "c"), (0.5, "c")])
def test_measuring_begins_at_the_first_plan_that_may_fit(limit: float, first: str) -> None:
    plans = {"a": Plan(), "b": Plan(checkpointing="full"), "c": Plan("nf4", "full")}
    needs = dict(zip(plans.values(), (10, 5, 2)))
    tried = probe.worth_trying(list(plans.values()), lambda plan, room: needs[plan] <= room, limit)
    assert list(tried) == list(plans.values())["abc".index(first):]


def test_plans_that_cannot_fit_are_not_tried_though_one_before_them_may() -> None:
    plans = [Plan(), Plan(checkpointing="full"), Plan("fp8"), Plan("nf4", "full")]
    needs, asked = dict(zip(plans, (10, 5, 8, 7))), []
    tried = probe.worth_trying(plans, lambda plan, room: asked.append(plan) or needs[plan] <= room, 6)
    assert next(tried) == plans[1] and asked == plans[:2]  # an estimate takes a second
    assert list(tried) == plans[3:], "the last one always"


def test_several_processes_take_the_first_plan_that_fits_all_of_them(monkeypatch) -> None:
    """One cannot load the first, another has less room for the second and runs out of memory with the third."""
    plans = [Plan(), Plan("none", "full", shards=2), Plan("fp8", "full"), Plan("nf4", "full")]
    peaks = {1: [4, 4, 4, 4], 0: [4, 9, None, 5]}
    monkeypatch.setattr(probe, "measure", lambda session, meter: meter.peaks[plans.index(session.plan)])

    def work(member: Member) -> tuple[Plan, probe.Peaks]:
        def build(plan: Plan) -> SimpleNamespace:
            if member.rank == 1 and plan == plans[0]:
                raise torch.OutOfMemoryError("full")
            return SimpleNamespace(plan=plan, denoiser=None, offload=None)

        meter = SimpleNamespace(limit=8, peaks=peaks[member.rank])
        session, tried = probe.settle(build, iter(plans), 16, meter, SimpleNamespace(phase=print), member)
        return session.plan, tried

    assert outcomes(2, work) == [(plans[3], dict(zip(plans, [None, 9, None, 5])))] * 2
