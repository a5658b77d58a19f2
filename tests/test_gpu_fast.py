"""CUDA graphs on a real GPU: the numbers of plain passes, in every way of training, and a way back where they fail.

    pytest -m gpu tests/test_gpu_fast.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import projects
from tests.bench import step_time, true_size
from tests.bench.true_size import Size
from trainer.events import Event, EventReader
from trainer.fast import start
from trainer.run import Run
from trainer.session import Session
from trainer.update import Update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
STEPS = 12
CUDA = "cuda:0"

Steps = tuple[list[float], list[Tensor], list[str]]  # losses, how far the weights moved, and notes


def tiny(method: str, row: str, *changes: str) -> tuple[Session, Size]:
    """A session with a tiny model of a case's topology, in fp32."""
    [found] = step_time.rows_of(row, [method])
    size = true_size.shrunk(true_size.SIZES[found.size])
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, found.quantize, device, torch.float32)
    return step_time.session_of(size, method, changes, denoiser, device, torch.float32, found), size


def steps(session: Session, size: Size, count: int = STEPS) -> Steps:
    """Take so many."""
    notes: list[str] = []
    begun = [leaf.detach().clone() for leaf in session.adapter.parameters()]
    step = step_time.trainer_step(session, size, notes)
    losses = [step(number).item() for number in range(count)]
    replayed = len(session.graphs.captured) if session.graphs is not None else None
    start.finish(session)
    moved = [leaf.detach() - before for leaf, before in zip(session.adapter.parameters(), begun)]
    return losses, moved, [*notes, f"{replayed} graphs"]


def assert_same(fast: Steps, plain: Steps) -> None:
    """To the bit, as it is where the same kernels run in the same order, each of which repeats itself (`exact`)."""
    assert fast[0] == plain[0]
    assert all(map(torch.equal, fast[1], plain[1])) and any(leaf.any() for leaf in plain[1])


def assert_close(fast: Steps, plain: Steps) -> None:
    """As far as rounding in another order lets it: fp32 gives 3e-7 of the loss, and 2e-4 of the way."""
    assert fast[0] == pytest.approx(plain[0], rel=1e-5)
    for one, other in zip(fast[1], plain[1]):
        assert (one - other).norm() <= 1e-2 * other.norm()


WAYS = [("stella", "sd15:2"), ("lora", "sdxl:1"), ("stiefel", "klein-4b:1"), ("stella", "flux1-dev:1"),
        ("lora", "sd15:2:full"), ("stella", "sd15:2:none:fp8"), ("lora", "sd15:2:none:nf4"),
        ("stella", "klein-4b:1:full:nf4")]


@pytest.mark.parametrize("way", WAYS, ids=[" ".join(way) for way in WAYS])
def test_graphs_give_the_numbers_of_plain_passes(exact, way: tuple[str, str]) -> None:
    plain, fast = (steps(*tiny(*way, f"memory.cuda_graphs={chosen}")) for chosen in ("off", "on"))
    assert fast[2][-1] == "1 graphs", fast[2]
    assert_same(fast, plain)
    assert len(set(fast[0])) > STEPS // 2, "noise is drawn anew in each step"


@pytest.mark.parametrize("change", ["adapter.dora=true", "train.optimizer=sgd", "train.snr_gamma=5"])
def test_graphs_hold_in_other_ways_of_training(exact, change: str) -> None:
    plain, fast = (steps(*tiny("lora", "sd15:2", f"memory.cuda_graphs={chosen}", change)) for chosen in ("off", "on"))
    assert fast[2][-1] == "1 graphs", fast[2]
    assert_same(fast, plain)


COMPILED = [("stella", "klein-4b:1"), ("lora", "flux1-dev:1:full"), ("lora", "klein-4b:1:none:fp8"),
            ("stella", "klein-4b:1:full:int8"), ("stella", "flux1-dev:1:full:nf4")]


@pytest.mark.parametrize("way", COMPILED, ids=[" ".join(way) for way in COMPILED])
def test_compiled_blocks_give_the_numbers_of_plain_ones_as_graphs_too(exact, way: tuple[str, str]) -> None:
    plain = steps(*tiny(*way, "memory.cuda_graphs=off", "train.compile=off"))
    for graphs in ("off", "on"):
        fast = steps(*tiny(*way, f"memory.cuda_graphs={graphs}", "train.compile=on"))
        assert any("blocks are compiled" in note for note in fast[2]), fast[2]
        assert fast[2][-1] == ("1 graphs" if graphs == "on" else "None graphs"), fast[2]
        assert_close(fast, plain)


# Whole runs.


def train(project: Path, workspace: Path, name: str, *changes: str) -> Run:
    command = [sys.executable, "-m", "trainer", "--preset", str(project), "--workspace", str(workspace)]
    return finish(command + ["--name", name], Run(workspace / "runs" / name), changes)


def finish(command: list[str], run: Run, changes: Sequence[str]) -> Run:
    for change in changes:
        command += ["--set", change]
    own = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}  # the run sets it
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=own)
    assert done.returncode == 0, done.stderr[-3000:] + run.log_tail()
    return run


def of(run: Run, kind: str) -> list[Event]:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind]


EXACT = ("train.deterministic=true", "train.lr_scheduler=constant", "memory.cuda_graphs=on", "log.tensorboard=false",
         "sample.prompts=[]", "train.grad_accum=2")


def weights(run: Run, step: int) -> dict[str, Tensor]:
    return load_file(run.checkpoint(step) / "adapter.safetensors")


def test_runs_and_resumes_are_the_same_to_the_bit_with_graphs_and_without(tiny_project: Path, tmp_path: Path) -> None:
    plain = train(tiny_project, tmp_path, "plain", *EXACT, "train.steps=20", "memory.cuda_graphs=off")
    fast = train(tiny_project, tmp_path, "fast", *EXACT, "train.steps=20")
    broken = train(tiny_project, tmp_path, "broken", *EXACT, "train.steps=9")
    finish([sys.executable, "-m", "trainer", "--resume", str(broken.path)], broken, ["train.steps=20"])
    assert any("Steps run as CUDA graphs" in event["text"] for event in of(fast, "note"))
    for other in (fast, broken):
        assert [event["loss"] for event in of(other, "step")] == [event["loss"] for event in of(plain, "step")]
        expected = weights(plain, 20)
        for key, tensor in weights(other, 20).items():
            assert torch.equal(tensor, expected[key]), key
    assert [event["loss"] for event in of(fast, "validation")] == [event["loss"] for event in of(plain, "validation")]


# On the way.


def running(project: Path, workspace: Path, *changes: str) -> Session:
    """A session of the tiny project on the GPU, ready to step."""
    session = projects.session(project, workspace, "memory.cuda_graphs=on", "train.precision=fp32", *changes,
                               device=CUDA)
    start.prepare(session)
    return session


def take(session: Session, update: Update, step: int) -> Tensor:
    loss = session.gradients(session.order.batch(step), coming=session.order.batch(step + 1)).clone()
    update(loss)
    session.progress.step += 1
    return loss


def told(session: Session) -> list[str]:
    return [event["text"] for event in EventReader(session.run.events).read() if event["kind"] == "note"]


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_step_never_waits_for_the_gpu(tiny_project, tmp_path, graphs: str) -> None:
    session = running(tiny_project, tmp_path, f"memory.cuda_graphs={graphs}", "data.buckets=false")
    update = Update(session.adapter, session.optimizer, 1.0)
    for step in range(6):
        take(session, update, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [take(session, update, step) for step in range(6, 10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    start.finish(session)


def test_every_shape_has_its_graph_and_validation_in_between_changes_nothing(exact, tiny_project, tmp_path) -> None:
    found = []
    for number, between in enumerate((False, True)):
        session = running(tiny_project, tmp_path / str(number), "train.deterministic=true")
        update = Update(session.adapter, session.optimizer, 1.0)
        losses = []
        for step in range(16):
            losses.append(take(session, update, step))
            if between:
                session.use("ema")
                with torch.no_grad():
                    session.loss(session.order.batch(0))
        found.append(torch.stack(losses))
        assert len(session.graphs.captured) >= 2, told(session)
        start.finish(session)
    assert torch.equal(*found)


@pytest.mark.parametrize("act, words", [(lambda out: out.sum().item(), "makes the computer wait"),
                                        (lambda out: torch.cuda.synchronize(), "cannot be recorded")])
def test_what_cannot_be_recorded_falls_back_and_training_goes_on(exact, tiny_project, tmp_path, act, words) -> None:
    session, plain = (running(tiny_project, tmp_path / name, "train.deterministic=true") for name in "ab")
    session.denoiser.conv_out.register_forward_hook(lambda module, given, out: (act(out), None)[1])
    losses = []
    for one in (session, plain):
        update = Update(one.adapter, one.optimizer, 1.0)
        losses.append(torch.stack([take(one, update, step) for step in range(12)]))
    assert not session.graphs.on and any(words in text for text in told(session)), told(session)
    assert plain.graphs.captured
    assert torch.equal(*losses)
    for one in (session, plain):
        start.finish(one)


def test_dropped_graphs_give_their_memory_back(tiny_project, tmp_path) -> None:
    session = running(tiny_project, tmp_path, "data.buckets=false")
    update = Update(session.adapter, session.optimizer, 1.0)
    for step in range(8):
        take(session, update, step)
    torch.cuda.empty_cache()
    with_graphs = torch.cuda.memory_reserved()
    start.finish(session)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < with_graphs
    session.gradients(session.order.batch(8))
