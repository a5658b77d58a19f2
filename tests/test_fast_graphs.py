"""Which passes are recorded, which run as they are, and that the numbers do not tell one from the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import projects
from trainer.errors import UserError
from trainer.fast import compile as block_compiler
from trainer.fast import graphs as fast_graphs
from trainer.fast import start
from trainer.fast.graphs import FIRST_PASSES, MOST_SHAPES, StepGraphs, Waits, explain, shape_key
from trainer.preset import load
from trainer.session import Session

GIB = 2**30


class Again:
    """A recording as a CPU can have it: the work itself, which writes its result where it first did."""

    def __init__(self, work: Callable[[], Tensor], result: Tensor) -> None:
        self.work, self.result, self.replays = work, result, 0

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.work())


class FakeRecorder:
    """Records without running, as CUDA does, by doing the work again on the same inputs."""

    def __init__(self, held: int = 0, waits: bool = False, error: Exception | None = None) -> None:
        self.held, self.waits, self.error, self.made = held, waits, error, []

    def watched(self, work: Callable[[], Tensor]) -> Tensor:
        result = work()
        if self.waits:
            raise Waits from RuntimeError("called a synchronizing CUDA operation")
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Again, Tensor]:
        if self.error is not None:
            raise self.error
        self.made.append(Again(work, torch.zeros(())))
        return self.made[-1], self.made[-1].result

    def allocated(self) -> int:
        return self.held

    def reserved(self) -> int:
        return self.held


class Toy:
    """loss = mean(w x): its gradient adds up in place, as the bank's does."""

    def __init__(self, recorder: FakeRecorder, room: int = 0) -> None:
        self.weight = torch.ones(())
        self.gradient, self.passes, self.told, self.quieted = torch.zeros(()), 0, [], 0
        self.recorder = recorder
        self.graphs = StepGraphs(self.forward, self.backward, self.quiet, [self.gradient], room, self.told.append,
                                 recorder)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        self.passes += 1
        self.x = inputs["x"]
        return (self.weight * self.x).mean()

    def backward(self, loss: Tensor) -> None:
        self.gradient.add_(self.x.mean())

    def quiet(self) -> None:
        self.quieted += 1

    def step(self, value: float, size: int = 3) -> float:
        return self.graphs({"x": torch.full((size,), value)}).item()


def test_a_shape_is_recorded_after_its_first_passes_and_replayed_from_then_on() -> None:
    toy = Toy(FakeRecorder())
    for number in range(6):
        assert toy.step(float(number)) == number
    assert toy.gradient == 15
    assert len(toy.recorder.made) == 1 and toy.recorder.made[0].replays == 6 - FIRST_PASSES
    assert len(toy.told) == 1 and toy.told[0].startswith("Steps run as CUDA graphs")


def test_each_shape_has_its_own_graph() -> None:
    toy = Toy(FakeRecorder())
    for _ in range(4):
        for size in (2, 3, 5):
            assert toy.step(float(size), size) == size
    assert len(toy.recorder.made) == 3 and len(toy.told) == 1
    assert toy.gradient == 4 * (2 + 3 + 5)


def test_the_weights_of_the_moment_count_in_a_replay() -> None:
    toy = Toy(FakeRecorder())
    for _ in range(3):
        toy.step(1.0)
    toy.weight.fill_(7.0)
    assert toy.step(1.0) == 7.0


def test_a_tensor_more_or_another_dtype_is_another_shape() -> None:
    plain = {"x": torch.zeros(2)}
    keys = [shape_key(plain), shape_key(plain | {"mask": torch.zeros(2)}), shape_key({"x": torch.zeros(2).half()}),
            shape_key({"x": torch.zeros(3)})]
    assert len(set(keys)) == 4


def test_a_pass_that_waits_is_done_again_without_its_gradients_counting_twice() -> None:
    toy = Toy(FakeRecorder(waits=True))
    for _ in range(5):
        assert toy.step(2.0) == 2.0
    assert toy.gradient == 10 and not toy.recorder.made
    assert len(toy.told) == 1 and "wait for the GPU (called a synchronizing" in toy.told[0]


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory"), "their memory does not fit"),
    (RuntimeError("operation not permitted when stream is capturing\nmore"), "cannot be recorded (operation not perm")])
def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once(error: Exception, words: str) -> None:
    toy = Toy(FakeRecorder(error=error))
    for number in range(5):
        assert toy.step(float(number)) == number
    assert toy.gradient == 10 and toy.passes == 5
    assert len(toy.told) == 1 and words in toy.told[0] and "more" not in toy.told[0]
    assert words in f"x {explain(error)}"


class Growing(FakeRecorder):
    """A forward pass that holds `activations` bytes more."""

    def __init__(self, held: int, activations: int) -> None:
        super().__init__(held)
        self.activations, self.asked = activations, 0

    def allocated(self) -> int:
        self.asked += 1
        return self.held + (self.activations if self.asked % 2 == 0 else 0)


@pytest.mark.parametrize("room, recorded", [(0, 1), (40 * GIB, 1), (20 * GIB, 0)])
def test_graphs_are_recorded_only_where_there_is_room_for_them_and_for_passes_without(room: int, recorded: int) -> None:
    toy = Toy(Growing(4 * GIB, 8 * GIB), room)  # needs 4 + 2.25 * 8 = 22 GiB
    for _ in range(4):
        toy.step(1.0)
    assert toy.graphs.activations == 8 * GIB
    assert len(toy.recorder.made) == recorded and toy.gradient == 4
    assert ("about 22.0 GiB of the 20.0 GiB" in toy.told[0]) == (not recorded)


def test_only_so_many_graphs_are_held_and_one_that_is_seldom_used_gives_way() -> None:
    toy = Toy(FakeRecorder())
    for size in range(1, MOST_SHAPES + 1):
        for _ in range(3):
            toy.step(1.0, size)
    for _ in range(3):
        toy.step(1.0, 99)
    assert len(toy.recorder.made) == MOST_SHAPES, "as rare as the others: none gives way"
    for _ in range(4):
        toy.step(1.0, 99)
    assert len(toy.recorder.made) == MOST_SHAPES + 1 and len(toy.graphs.captured) == MOST_SHAPES
    assert toy.gradient == 3 * MOST_SHAPES + 7


def test_dropped_graphs_are_recorded_anew() -> None:
    toy = Toy(FakeRecorder())
    for _ in range(4):
        toy.step(1.0)
    toy.graphs.drop()
    assert not toy.graphs.captured
    for _ in range(4):
        toy.step(1.0)
    assert len(toy.recorder.made) == 2 and toy.gradient == 8


def gradients(session: Session, steps: int) -> list[Tensor]:
    losses = torch.stack([session.gradients(session.order.batch(step)).clone() for step in range(steps)])
    found = [losses, session.seen.clone(), *(leaf.grad.clone() for leaf in session.adapter.parameters())]
    session.adapter.zero_grad()
    return found


def test_a_sessions_passes_have_the_same_gradients_recorded_or_not(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "train.grad_accum=2", "train.batch_size=1")
    plain, recorder = gradients(session, 8), FakeRecorder()
    session.graphs = StepGraphs(session.forward, session.backward, lambda: session.use("off"),
                                [leaf.grad for leaf in session.adapter.parameters()], 0, lambda text: None, recorder)
    recorded = gradients(session, 8)
    assert sum(made.replays for made in recorder.made) > 4
    for one, other in zip(plain, recorded):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("change, words", [
    ("adapter.dropout=0.1", "draws at random"), ('adapter.targets=["attention","text_encoder"]', "encoded anew")])
def test_what_keeps_a_run_from_graphs_is_said(tiny_project, tmp_path, monkeypatch, change, words) -> None:
    session = projects.session(tiny_project, tmp_path, change)
    session.device = torch.device("cuda", 0)
    assert words in start.obstacle(session)


def test_a_cpu_reads_no_batches_ahead_has_no_graphs_and_says_so_only_when_asked(tiny_project, tmp_path) -> None:
    told = {}
    for number, chosen in enumerate(("auto", "on", "off")):
        session = projects.session(tiny_project, tmp_path, f"memory.cuda_graphs={chosen}", "train.steps=500",
                                   name=f"run{number}")
        start.prepare(session)
        assert session.prefetch is None and session.graphs is None
        session.recorder.close()
        told[chosen] = "CUDA graphs" in session.run.events.read_text()
        start.finish(session)
    assert told == {"auto": False, "on": True, "off": False}


def test_graphs_are_worth_it_for_unets_and_runs_of_some_length(tiny_project, tmp_path) -> None:
    session = projects.session(tiny_project, tmp_path, "train.steps=500")
    session.device = torch.device("cuda", 0)
    assert start.worth_it(session)
    session.progress.step = 490
    assert not start.worth_it(session)
    session.progress.step = 0
    session.preset = session.preset.model_copy(update={"model": session.preset.model.model_copy(
        update={"family": "flux2"})})
    assert not start.worth_it(session)
    block_compiler.install(session.denoiser)
    assert start.worth_it(session), "small kernels, once its blocks are compiled"


def test_only_a_wait_counts_as_one(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    set_to = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_to.append)
    with pytest.raises(Waits), fast_graphs._no_waiting():
        raise RuntimeError("called a synchronizing CUDA operation")
    with pytest.raises(RuntimeError, match="something else"), fast_graphs._no_waiting():
        raise RuntimeError("something else")
    assert set_to == ["error", 0, "error", 0]


@pytest.mark.parametrize("change, words", [
    ("adapter.dropout=0.1", "adapter.dropout"), ("memory.device=cpu", "memory.device = 'cpu'"),
    ("memory.offload_blocks=2", "memory.offload_blocks"),
    ('adapter.targets=["attention","text_encoder"]', "'text_encoder' in adapter.targets")])
def test_graphs_that_cannot_be_are_refused_in_the_preset(tiny_project, change: str, words: str) -> None:
    load(tiny_project, [change, "memory.cuda_graphs=auto"])
    with pytest.raises(UserError, match="memory.cuda_graphs=on: 'on' does not go with " + words.replace(".", r"\.")):
        load(tiny_project, [change, "memory.cuda_graphs=on"])
