"""A run that runs out of memory in a step goes on in a more sparing way, and loses nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tests import projects
from tests.test_distributed import outcomes
from tests.test_loop import assert_same_weights, events, go_on, start
from trainer import checkpoint
from trainer import preset as presets
from trainer import run as runs
from trainer.distributed import World
from trainer.errors import UserError
from trainer.fast import start as fast
from trainer.loop import run_training
from trainer.memory.blocks import repeated_blocks
from trainer.memory.hold import change, step_down, working
from trainer.memory.plan import Plan
from trainer.run import Run
from trainer.session import Session

PLAIN = ("sample.prompts=[]", "evaluate.folder=", "log.rank_every=0", "output.save_every=0", "train.steps=4",
         "train.grad_accum=2", "adapter.dropout=0.2", "train.ema_decay=0.9")


@contextmanager
def failing(*passes: int) -> Iterator[list[int]]:
    """Let the denoiser run out of memory in these of its forward passes, deep inside it."""
    seen: list[int] = []

    def enter(module: nn.Module, _inputs: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append(len(seen))
        elif seen and seen[-1] in passes and isinstance(module, nn.Conv2d):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def unbroken(tiny_project, tmp_path_factory) -> Run:
    return start(tiny_project, tmp_path_factory.mktemp("unbroken"), "run", *PLAIN)


def notes(run: Run) -> list[str]:
    return [event["text"] for event in events(run, "note") if "memory" in event["text"]]


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run, "step")}


def test_a_step_that_does_not_fit_is_done_again_and_the_run_ends_as_an_unbroken_one(tiny_project, tmp_path,
                                                                                    unbroken) -> None:
    with failing(3, 4, 5):  # the second micro-batch of step 2, then the first when it is done again, and again
        run = start(tiny_project, tmp_path, "run", *PLAIN, "output.save_every=1", "output.keep=9")
    assert losses(run) == losses(unbroken)
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_weights(run.checkpoint(4) / file, unbroken.checkpoint(4) / file)
    first, _, third = notes(run)
    assert first == ("Step 2 did not fit into the GPU's memory with unquantised, no checkpointing. It is done again, "
                     "and the run goes on, with unquantised, selective checkpointing")
    assert third.endswith("with unquantised, checkpointing, 5 of 16 blocks in system memory")
    plans = [checkpoint.load(run.checkpoint(step))[0].plan["offload_blocks"] for step in (1, 2)]
    assert plans == [0, 5]


def test_steps_that_do_not_fit_when_they_are_timed_are_left_to_the_first_step(tiny_project, tmp_path, monkeypatch,
                                                                              unbroken) -> None:
    monkeypatch.setattr(fast, "may_pay", lambda session: True)
    monkeypatch.setattr(fast, "compile_obstacle", lambda session: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with failing(0, 1) as passes:
        run = start(tiny_project, tmp_path, "run", *PLAIN)
    assert len(passes) == 2 + 2 * 4 and losses(run) == losses(unbroken)
    assert [note.partition(" with ")[0] for note in notes(run)] == ["Step 1 did not fit into the GPU's memory"]


def test_a_resume_goes_on_in_the_way_it_had_come_to(tiny_project, tmp_path, unbroken) -> None:
    preset = presets.load(tiny_project, PLAIN)
    run = runs.create(tmp_path, "run", presets.dumps(preset))
    with failing(2):
        session_at_stop(run, preset, tmp_path)
    go_on(run)
    assert checkpoint.last_progress(run).plan["checkpointing"] == "selective" and len(notes(run)) == 1
    assert losses(run) == losses(unbroken)


def session_at_stop(run: Run, preset: presets.Preset, workspace: Path) -> None:
    """Train until a stop, asked for by the step after the one that did not fit."""
    real = Session.gradients

    def asking(session: Session, draws: list, rounds: int | None = None, coming: tuple = ()) -> torch.Tensor:
        if session.progress.step == 2:
            run.request("stop")
        return real(session, draws, rounds, coming)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "gradients", asking)
        run_training(run, preset, workspace)
    assert run.last_step() == 3


def test_when_nothing_more_can_be_saved_the_fault_says_so_and_the_last_step_is_kept(tiny_project, tmp_path) -> None:
    fixed = ["memory.quantize=none", "memory.offload_blocks=0"]
    with failing(*range(2, 99)), pytest.raises(UserError, match="Step 2 did not fit into the GPU's memory with "
                                               "unquantised, checkpointing, and nothing more can be saved. Close"):
        start(tiny_project, tmp_path, "run", *PLAIN, *fixed)
    run = runs.open_run(tmp_path / "runs" / "run")
    assert run.last_step() == 1 and run.state().word == "failed"


def test_pictures_that_do_not_fit_are_left_out(tiny_project, tmp_path) -> None:
    with failing(0):
        run = start(tiny_project, tmp_path, "run", "sample.before=true", "evaluate.folder=", "log.rank_every=0",
                    "train.steps=1")
    assert notes(run) == ["drawing samples failed, training goes on: it did not fit into the GPU's memory beside the "
                          "model that is trained"]
    assert run.state().word == "done" and len(events(run, "sample")) == 1


@pytest.fixture(scope="module")
def session(tiny_project, tmp_path_factory) -> Session:
    return projects.session(tiny_project, tmp_path_factory.mktemp("session"), *PLAIN, "adapter.dropout=0")


def loss_of(session: Session) -> tuple[float, list[torch.Tensor]]:
    session.adapter.zero_grad()
    loss = session.gradients(session.order.batch(0))
    return loss.item(), [leaf.grad.clone() for leaf in session.adapter.parameters()]


@pytest.mark.parametrize("plan", [Plan(checkpointing="full"), Plan("none", "full", 5), Plan("none", "full", 15),
                                  Plan("none", "full", 2), Plan()])
def test_any_way_to_hold_the_same_weights_gives_the_same_gradients(session, plan) -> None:
    change(session, Plan())
    loss, gradients = loss_of(session)
    change(session, plan)
    assert session.plan == plan
    again, others = loss_of(session)
    assert again == loss and all(torch.equal(one, other) for one, other in zip(gradients, others))


@pytest.mark.parametrize("count", [5, 15])
def test_other_blocks_are_offloaded_without_all_of_them_on_the_device(session, monkeypatch, count) -> None:
    change(session, Plan("none", "full", 10))
    loss, gradients = loss_of(session)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_strided", lambda *_, **__: pytest.fail("a block is brought back"))
        change(session, Plan("none", "full", count))
    hosts = {block.host.untyped_storage().data_ptr() for block in session.offload.blocks}
    assert len(hosts) == count
    again, others = loss_of(session)
    assert again == loss and all(torch.equal(one, other) for one, other in zip(gradients, others))
    assert {len(block._forward_pre_hooks) for block in repeated_blocks(session.denoiser)} == {0, 1}
    change(session, Plan())
    assert loss_of(session)[0] == loss


def test_weights_loaded_anew_get_the_same_adapter(session) -> None:
    change(session, Plan())
    loss, _ = loss_of(session)
    change(session, Plan("int8", "full"))
    assert session.denoiser is not None and abs(loss_of(session)[0] - loss) < 0.05 * loss
    session.use("off")
    change(session, Plan())
    assert loss_of(session)[0] == loss


def test_a_change_that_does_not_fit_either_goes_one_further(session, monkeypatch) -> None:
    change(session, Plan())
    real: Callable = session.family.load_denoiser
    tried: list[str] = []

    def load(base: object, device: torch.device, dtype: torch.dtype, quantize: str) -> nn.Module:
        tried.append(quantize)
        if quantize == "fp8":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, device, dtype, quantize)

    monkeypatch.setattr(session.family, "load_denoiser", load)
    monkeypatch.setattr("trainer.memory.hold.below", lambda *_: [Plan("fp8", "full"), Plan("int8", "full")])
    loss_of(session)
    step_down(session)
    assert tried == ["fp8", "int8"] and session.plan == Plan("int8", "full")
    assert all(not leaf.grad.any() for leaf in session.adapter.parameters())
    loss_of(session)


def test_what_cannot_be_loaded_here_is_no_way_to_save_memory(session, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    change(session, Plan("fp8", "full", 15))
    with pytest.raises(UserError, match="and nothing more can be saved"):
        step_down(session)
    assert session.plan == Plan("fp8", "full", 15)
    change(session, Plan())


def test_several_processes_leave_out_what_one_of_them_cannot_hold(monkeypatch) -> None:
    monkeypatch.setattr("trainer.memory.hold.works", lambda mode, device: mode != device)
    plans = [Plan(), Plan("fp8"), Plan("nf4")]
    assert outcomes(2, lambda member: list(working(plans, ["fp8", "none"][member.rank], member))) == [[plans[2]]] * 2


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_notes_for_other_runs_how_the_model_is_held(session, monkeypatch, first) -> None:
    noted, world = [], World()
    world.first = first
    monkeypatch.setattr("trainer.speed.remember_plan", lambda *given: noted.append(given[3]))
    monkeypatch.setattr(session, "world", world)
    monkeypatch.setattr(session, "limit", 2**30)
    change(session, Plan())
    step_down(session)
    assert noted == [Plan(checkpointing="selective")] * first


def too_large_for(kind: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the whole model not fit a kind of device the first time; returns where it was loaded."""
    real, places = session.family.load_denoiser, []

    def load(base: object, device: torch.device, dtype: torch.dtype, quantize: str) -> nn.Module:
        places.append(device.type)
        if device.type == kind and len(places) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, device, dtype, quantize)

    monkeypatch.setattr(session.family, "load_denoiser", load)
    return places


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU")])])
def test_a_model_that_only_fits_without_its_offloaded_blocks_is_loaded_through_the_host(
        tiny_project, tmp_path, monkeypatch, device) -> None:
    session = projects.session(tiny_project, tmp_path, *PLAIN, "adapter.dropout=0", device=device)
    loss, gradients = loss_of(session)
    places = too_large_for(device, session, monkeypatch)
    session.adapter.remove()
    session.denoiser = None
    change(session, Plan("none", "full", 5))
    assert places == [device, "cpu"]
    assert {tensor.device.type for tensor in session.offload.buffers} == {device}
    again, others = loss_of(session)
    assert again == pytest.approx(loss, rel=1e-4)
    for one, other in zip(gradients, others):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_model_that_does_not_fit_and_is_not_offloaded_is_a_fault(session, monkeypatch) -> None:
    change(session, Plan())
    too_large_for("cpu", session, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        change(session, Plan("fp8", "full"))
    change(session, Plan())
