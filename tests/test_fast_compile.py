"""Compiled blocks: the same gradients, one function for a class, only where gradients are recorded, only where it pays.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tests import projects
from tests.bench import step_time, true_size
from tests.test_distributed import Member, outcomes
from trainer.errors import UserError
from trainer.fast import compile as block_compiler
from trainer.fast import passes, start
from trainer.memory.hold import step_down
from trainer.memory.plan import Plan
from trainer.preset import load
from trainer.session import Session


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with everything but the generation of code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    block_compiler.compiled_forward.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    block_compiler.compiled_forward.cache_clear()


def tiny(case: str, method: str) -> tuple[Session, true_size.Size]:
    [row] = step_time.rows_of(case, [method])
    size, device = true_size.shrunk(true_size.SIZES[row.size]), torch.device("cpu")
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, row.quantize, device, torch.float32)
    return step_time.session_of(size, method, [], denoiser, device, torch.float32, row), size


def gradients(session: Session, size: true_size.Size) -> list[Tensor]:
    loss = session.gradients(true_size.draws(size, 0))
    found = [loss, *(leaf.grad.clone() for leaf in session.adapter.parameters())]
    session.adapter.zero_grad()
    return found


@pytest.mark.parametrize("case, method", [("klein-4b:1:selective", "stella"), ("flux1-dev:1:full:nf4", "lora")])
def test_compiled_blocks_have_the_same_gradients_and_share_their_code(quick_compiler, case: str, method: str) -> None:
    session, size = tiny(case, method)
    plain = gradients(session, size)
    block_compiler.install(session.denoiser)
    for one, other in zip(plain, gradients(session, size)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(block_compiler.blocks_of(session.denoiser))
    assert not torch._dynamo.utils.counters["graph_break"]
    block_compiler.remove(session.denoiser)
    assert torch.equal(gradients(session, size)[0], plain[0])


def test_pictures_are_drawn_without_the_compiler(quick_compiler) -> None:
    session, size = tiny("klein-4b:1", "lora")
    block_compiler.install(session.denoiser)
    with torch.no_grad():
        session.loss(true_size.draws(size, 0))
    assert not torch._dynamo.utils.counters["stats"]


def test_a_compiler_that_fails_is_told_and_leaves_everything_as_it_was(tiny_project, tmp_path, monkeypatch) -> None:
    session = projects.session(tiny_project, tmp_path, "train.compile=on")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    block_compiler.compiled_forward.cache_clear()
    before = session.gradients(session.order.batch(0))
    session.adapter.zero_grad()
    start._try_compiled(session)
    session.recorder.close()
    assert "since that failed: no compiler found\"" in session.run.events.read_text()
    assert torch.equal(session.gradients(session.order.batch(0)), before)


@pytest.mark.parametrize("asked, sec, fails, compiled", [
    ("auto", (9.0, 0.0), False, True), ("auto", (0.1, 0.2), False, False), ("auto", (9.0, None), False, False),
    ("auto", (9.0, 9.0), True, False), ("on", (0.0, 0.0), False, True), ("on", (0.0, 0.0), True, False)])
def test_several_processes_compile_alike(monkeypatch, asked: str, sec: tuple, fails: bool, compiled: bool) -> None:
    """By the slowest; where one runs out of memory or cannot compile, none does."""
    monkeypatch.setattr(start, "may_pay", lambda session: True)
    monkeypatch.setattr(start, "compile_obstacle", lambda session: None)
    monkeypatch.setattr(start, "pays", lambda session, seconds: seconds > 1)

    def seconds(session: Session) -> float:
        if sec[session.world.rank] is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sec[session.world.rank]

    def once(session: Session) -> None:
        if fails and session.world.rank:
            raise KeyError("no compiler found")

    monkeypatch.setattr(passes, "seconds", seconds)
    monkeypatch.setattr(passes, "once", once)

    sessions = [tiny("klein-4b:1", "lora")[0] for _ in sec]

    def work(member: Member) -> bool:
        session = sessions[member.rank]
        session.world, session.preset = member, session.preset.model_copy(update={
            "train": session.preset.train.model_copy(update={"compile": asked})})
        session.recorder = Mock()
        start._compile(session)
        return block_compiler.is_installed(session.denoiser)

    assert outcomes(2, work) == [compiled] * 2


@pytest.mark.parametrize("change, words", [("adapter.dropout=0.1", "adapter.dropout"), ("train.steps=9", None)])
def test_what_keeps_blocks_from_being_compiled_is_known(tiny_project, tmp_path, monkeypatch, change, words) -> None:
    session = projects.session(tiny_project, tmp_path, change)
    monkeypatch.setattr(block_compiler, "compiler_missing", lambda: None)
    assert "needs an NVIDIA GPU" in start.compile_obstacle(session)
    session.device = torch.device("cuda", 0)
    for quantize in ("none", "nf4"):
        session.plan = Plan(quantize)
        found = start.compile_obstacle(session)
        assert found is None if words is None else words in found


@pytest.mark.parametrize("change, words", [("adapter.dropout=0.1", "adapter.dropout"),
                                           ("memory.offload_blocks=2", "memory.offload_blocks")])
def test_compiling_that_cannot_be_is_refused_in_the_preset(tiny_project, change: str, words: str) -> None:
    load(tiny_project, [change])
    load(tiny_project, ["memory.quantize=nf4", "train.compile=on"])
    with pytest.raises(UserError, match="train.compile=on: 'on' does not go with " + words):
        load(tiny_project, [change, "train.compile=on"])


def test_compiling_must_save_a_multiple_of_what_it_costs(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "train.steps=1000", "data.buckets=false")
    assert start.pays(session, 0.5) and not start.pays(session, 0.2)  # 1000 * 0.25 * s against 3 * 30
    session.progress.step = 800
    assert not start.pays(session, 0.5)


def test_unasked_only_long_runs_of_transformers_are_measured(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "train.steps=1000")
    session.device = torch.device("cuda", 0)
    assert not start.may_pay(session), "a UNet"
    session.preset = session.preset.model_copy(update={"model": session.preset.model.model_copy(
        update={"family": "flux2"})})
    assert start.may_pay(session)
    session.progress.step = 900
    assert not start.may_pay(session)


def test_only_a_long_run_on_a_gpu_says_that_triton_is_missing_and_says_it_once(monkeypatch) -> None:
    session, _ = tiny("klein-4b:1", "lora")
    monkeypatch.setattr(block_compiler, "compiler_missing", lambda: "no triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(passes, "seconds", lambda session: 1.0)
    for place, name in ((start.attention, "choose"), (start, "_record"), (start, "Prefetcher")):
        monkeypatch.setattr(place, name, Mock())
    for device, steps, dropout, told in (
            ("cpu", 5000, 0.0, []), ("cuda:0", 100, 0.0, []),
            ("cuda:0", 5000, 0.0, ["Frozen layers do not multiply in 8 bits, and the model's blocks are not compiled: "
                                   "no triton"]),
            ("cuda:0", 5000, 0.1, ["Frozen layers do not multiply in 8 bits: no triton",
                                   "The model's blocks are not compiled: adapter.dropout draws at random inside of a "
                                   "block"])):
        session.device, session.steps, session.recorder = torch.device(device), steps, Mock()
        session.preset = session.preset.model_copy(update={
            "adapter": session.preset.adapter.model_copy(update={"dropout": dropout})})
        start.prepare(session)
        assert [call.args[1] for call in session.recorder.note.call_args_list] == told


def test_a_step_that_does_not_fit_gives_up_compiled_blocks_before_selective_checkpointing() -> None:
    session, _ = tiny("klein-4b:1:selective", "lora")
    notes: list[str] = []
    session.recorder = SimpleNamespace(note=lambda step, text: notes.append(text))
    block_compiler.install(session.denoiser)
    step_down(session)
    assert session.plan == Plan(checkpointing="selective") and not block_compiler.remove(session.denoiser)
    step_down(session)
    assert session.plan == Plan(checkpointing="full") and session.denoiser.is_gradient_checkpointing
    assert [note.partition(". ")[0] for note in notes] == [
        "Step 1 did not fit into the GPU's memory with compiled blocks",
        "Step 1 did not fit into the GPU's memory with unquantised, selective checkpointing"]


@pytest.mark.parametrize("before, how", [
    (Plan(), "with unquantised, selective checkpointing, without compiled blocks and CUDA graphs"),
    (Plan(checkpointing="selective"), "without compiled blocks and CUDA graphs: so the blocks hold less")])
def test_a_step_that_does_not_fit_tells_what_is_given_up(before: Plan, how: str) -> None:
    session, _ = tiny(f"klein-4b:1:{before.checkpointing}", "lora")
    session.recorder, session.graphs = Mock(), SimpleNamespace(captured={}, on=True)
    block_compiler.install(session.denoiser)
    step_down(session)
    assert session.recorder.note.call_args.args[1].partition(" run goes on, ")[2] == how
    assert session.graphs is None and not block_compiler.is_installed(session.denoiser)
