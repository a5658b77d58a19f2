"""Selective checkpointing, the choice of attention's kernels and channels last on a real GPU.

    pytest -m gpu tests/test_gpu_selective.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.bench import step_time, true_size
from tests.test_gpu_fast import STEPS, assert_close, assert_same, steps, tiny
from trainer.fast import attention, convolutions, passes
from trainer.fast.attention import USUAL
from trainer.memory.hold import change
from trainer.memory.plan import Plan
from trainer.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def gradients(session: Session, size: true_size.Size) -> tuple[list[Tensor], int]:
    """Loss and gradients of a micro-batch, and bytes held between its passes."""
    inputs = session.inputs(true_size.draws(size, 0))
    before = torch.cuda.memory_allocated()
    loss = session.forward(inputs)
    held = torch.cuda.memory_allocated() - before
    session.backward(loss)
    found = [loss.detach(), *(leaf.grad.clone() for leaf in session.adapter.parameters())]
    session.adapter.zero_grad()
    session.use("off")
    return found, held


@pytest.mark.parametrize("case", ["sd15:4", "sdxl:2", "klein-4b:2", "flux1-dev:1:none:nf4", "klein-4b:1:none:fp8"])
def test_gradients_are_those_without_checkpointing_and_less_is_held(exact, case: str) -> None:
    session, size = tiny("stella", case)
    gradients(session, size)  # libraries are loaded
    plain, held = gradients(session, size)
    again, _ = gradients(session, size)
    change(session, Plan(session.plan.quantize, "selective"))
    redone, less = gradients(session, size)
    assert less < held
    assert all(map(torch.equal, plain, again)), "a GPU repeats itself"
    assert all(map(torch.equal, plain, redone)) and any(one.any() for one in plain[1:])


@pytest.mark.parametrize("way", [("lora", "sd15:2:selective"), ("stella", "sdxl:1:selective"),
                                 ("stiefel", "klein-4b:1:selective"), ("lora", "flux1-dev:1:selective:nf4")], ids=str)
def test_graphs_give_the_numbers_of_plain_passes(exact, way: tuple[str, str]) -> None:
    plain, fast = (steps(*tiny(*way, f"memory.cuda_graphs={chosen}")) for chosen in ("off", "on"))
    assert fast[2][-1] == "1 graphs", fast[2]
    assert_same(fast, plain)
    assert len(set(fast[0])) > STEPS // 2


def test_compiled_blocks_give_the_numbers_of_plain_ones(exact) -> None:
    plain = steps(*tiny("lora", "klein-4b:1:selective", "memory.cuda_graphs=off", "train.compile=off"))
    fast = steps(*tiny("lora", "klein-4b:1:selective", "memory.cuda_graphs=off", "train.compile=on"))
    assert any("blocks are compiled" in note for note in fast[2]), fast[2]
    assert_close(fast, plain)


@pytest.mark.parametrize("case", ["klein-4b:1", "sd15:4"])
def test_attention_runs_by_the_kernels_that_were_timed_and_a_resume_keeps_them(case: str, tmp_path: Path) -> None:
    """At the true attention's shapes, in bf16; the model is a small one."""
    [row] = step_time.rows_of(case, ["lora"])
    size, device = true_size.shrunk(true_size.SIZES[row.size]), torch.device("cuda", 0)
    denoiser = true_size.denoiser_of(size, "none", device, torch.bfloat16)
    session = step_time.session_of(size, "lora", [], denoiser, device, torch.bfloat16, row)
    notes: list[str] = []
    session.recorder = SimpleNamespace(note=lambda step, text: notes.append(text), phase=lambda text: None)
    session.order = SimpleNamespace(batch=lambda step: true_size.draws(size, step))
    session.cache, session.steps = SimpleNamespace(root=tmp_path / "cache"), attention.WORTH_STEPS
    attention.choose(session)
    chosen = session.progress.attention
    assert chosen in (USUAL, *attention.BACKENDS) and len(notes) == (chosen != USUAL)
    attention.release(session)
    calls = attention.recorded(lambda: passes.first_forward(session))
    for call in calls:
        times = {name: attention.seconds(call, name, device) for name in (USUAL, *attention.BACKENDS)}
        whole = call.sizes[0][-1] % 8 == 0  # other widths of a head only FlashAttention takes, filled up
        assert times[USUAL] and times["flash"] and bool(times["efficient"]) == whole, times
        print(call.sizes, {name: found and f"{1e6 * found:.0f} us" for name, found in times.items()})
    session.progress.step = 7
    session.progress.attention = "efficient"
    attention.choose(session)
    assert torch._C._get_sdp_priority_order()[0] == int(attention.BACKENDS["efficient"].value)
    assert gradients(session, size)[0][0].isfinite()
    attention.release(session)


@pytest.mark.parametrize("case", ["sd15:2", "sdxl:1:selective"])
def test_channels_last_gives_the_same_numbers(exact, case: str) -> None:
    session, size = tiny("lora", case)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        convolutions.lay_out(session.denoiser, layout)
        found.append(gradients(session, size)[0])
    for one, other in zip(*found):
        assert (one - other).norm() <= 1e-2 * one.norm()
