"""Attention's kernels are chosen by the clock for the run's own shapes, once, and a resume goes on with them."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from tests.bench import true_size
from tests.test_memory_selective import tiny
from trainer.fast import attention, passes
from trainer.fast.attention import USUAL, Call

CPU = torch.device("cpu")
ONE, OTHER = (Call(((1, 2, length, 8),) * 3, ((16 * length, 8, 16, 1),) * 3, torch.float32) for length in (16, 4))


@pytest.mark.parametrize(("times", "chosen"), [
    ({"usual": 1.0, "flash": 0.9, "efficient": 1.5}, "flash"),
    ({"usual": 1.0, "flash": 0.99, "efficient": 1.5}, USUAL),  # not worth telling from chance
    ({"usual": 1.0, "flash": None, "cudnn": 0.5}, "cudnn"),
    ({"usual": 1.0, "flash": None, "cudnn": None}, USUAL)])
def test_the_fastest_is_taken_only_where_it_is_clearly_faster(times: dict, chosen: str) -> None:
    assert attention.fastest({ONE: times}, Counter({ONE: 3})) == (
        chosen, {name: 3 * (found or 1.0) for name, found in times.items()})


def test_calls_count_as_often_as_they_are_made() -> None:
    times = {ONE: {"usual": 2.0, "flash": 1.0}, OTHER: {"usual": 1.0, "flash": 4.0}}
    assert attention.fastest(times, Counter({ONE: 9, OTHER: 1}))[0] == "flash"
    assert attention.fastest(times, Counter({ONE: 1, OTHER: 9}))[0] == USUAL
    assert attention.fastest({}, Counter())[0] == USUAL


def test_what_is_remembered_is_for_calls_of_the_same_sizes_and_strides() -> None:
    turned = ONE._replace(strides=((256, 128, 8, 1),) * 3)
    keys = [attention.signature(Counter(calls), ["flash"], "GPU") for calls in (
        {ONE: 2, OTHER: 1}, {OTHER: 1, ONE: 2}, {turned: 2, OTHER: 1}, {ONE: 1, OTHER: 1})]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_cudnn_is_timed_only_where_torch_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, timed in (((9, 0), True), ((8, 9), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert ("cudnn" in attention.candidates(torch.device("cuda"))) == timed
    assert attention.candidates(CPU) == ["flash", "efficient"]


@pytest.mark.parametrize(("case", "count"), [("klein-4b:1", 5), ("sd15:1", 32)])
def test_the_runs_own_calls_are_recorded(case: str, count: int) -> None:
    session, size = tiny(case, "lora", ())
    session.order = SimpleNamespace(batch=lambda step: true_size.draws(size, step))
    before = F.scaled_dot_product_attention
    calls = attention.recorded(lambda: passes.first_forward(session))
    assert calls.total() == count and F.scaled_dot_product_attention is before
    for call in calls:
        assert 0 < attention.seconds(call, USUAL, CPU) < 1
        state = torch.get_rng_state()
        assert attention.seconds(call, "flash", CPU) is not None and attention.seconds(call, "cudnn", CPU) is None
        assert torch.equal(torch.get_rng_state(), state)


def test_what_is_preferred_comes_first_until_it_is_let_go() -> None:
    before = torch._C._get_sdp_priority_order()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with attention.preferred("efficient"):
            assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.EFFICIENT_ATTENTION.value)
            assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        assert torch._C._get_sdp_priority_order()[:3] == before[:3]  # of those that are on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_want_of_memory_is_not_taken_for_a_kernel_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, raised in (("CUDNN_STATUS_ALLOC_FAILED", True), ("no kernel for this", False)):
        monkeypatch.setattr(F, "scaled_dot_product_attention", Mock(side_effect=RuntimeError(words)))
        with pytest.raises(RuntimeError) if raised else nullcontext():
            assert attention.seconds(ONE, "flash", CPU) is None


def test_a_choice_is_measured_once_and_kept_by_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, size = tiny("klein-4b:1", "lora", ())
    notes, timed = [], []
    session.order = SimpleNamespace(batch=lambda step: true_size.draws(size, step))
    session.recorder = SimpleNamespace(note=lambda step, text: notes.append(text), phase=timed.append)
    session.cache = SimpleNamespace(root=tmp_path / "cache")

    def order_in(step: int, chosen: str = USUAL) -> int:
        """The backend that comes first in a run that begins at a step."""
        session.progress.step, session.progress.attention = step, chosen
        attention.choose(session)
        first = torch._C._get_sdp_priority_order()[0]
        attention.release(session)
        return first

    monkeypatch.setattr(attention, "seconds", lambda call, name, device: {"efficient": 1.0}.get(name, 2.0))
    usual, efficient = torch._C._get_sdp_priority_order()[0], int(SDPBackend.EFFICIENT_ATTENTION.value)
    assert order_in(0) == usual != efficient, "on a CPU there is nothing to choose"
    assert order_in(7) == usual and order_in(7, "efficient") == efficient and not timed
    monkeypatch.setattr(attention, "worth_it", lambda session: True)
    for place, name in ((attention, "seconds"), (passes, "first_forward")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, out_of_memory)
            assert order_in(0) == usual and not (tmp_path / "cache").exists()
    assert timed.pop() == "measuring attention" and not timed
    assert order_in(0) == order_in(0) == efficient and session.progress.attention == "efficient"
    assert timed == ["measuring attention"] and len(notes) == 2
    assert order_in(7) == usual, "what the run began with"
    assert order_in(7, "cudnn") == usual and session.progress.attention == "cudnn"
    assert notes[2] == ("Attention runs by PyTorch's own choice here: cuDNN, by which the run began, is not for this "
                        "GPU")
    assert torch._C._get_sdp_priority_order()[0] == usual
