"""Products in 8 bits are chosen by what is measured, told, remembered by a resume, and taken back without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import projects
from tests.test_loop import assert_same_weights, events, go_on, start, stop_at
from trainer import branch, checkpoint, preset, run
from trainer.control import Stopped
from trainer.errors import UserError
from trainer.fast import compile as block_compiler
from trainer.fast import low_bits, matmul, passes
from trainer.fast.low_bits import Found
from trainer.fast.matmul import LowBitLinear, LowBits
from trainer.loop import run_training
from trainer.memory.hold import change, reload
from trainer.memory.plan import Plan
from trainer.session import Session


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers and a CPU count as large ones and a GPU; the model is measured for nothing else."""
    monkeypatch.setattr(low_bits, "obstacle", lambda session, kind: None)
    for name, value in (("SIDE", 16), ("ROWS", 1), ("WORK", 1), ("may_pay", lambda session: True)):
        monkeypatch.setattr(low_bits, name, value)


def ready(project: Path, workspace: Path, *changes: str) -> Session:
    return projects.session(project, workspace, "adapter.method=stella", "adapter.init=random", *changes)


def told(session: Session) -> list[str]:
    session.recorder.close()
    return [event["text"] for event in events(session.run, "note")]


def gradients(session: Session) -> list[Tensor]:
    return passes.gradients(session, 1)[0]


def low_linears(session: Session) -> int:
    return sum(isinstance(module, LowBitLinear) for module in session.denoiser.modules())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_likeness_is_the_median_over_layers_and_leaves_out_what_has_no_gradient() -> None:
    one = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]]])  # l d r
    other = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    assert low_bits.likeness([[one]], [[other]]) == pytest.approx(0.5**0.5)
    assert low_bits.likeness([[one * torch.nan]], [[other]]) == -1


def test_large_is_what_is_large_on_all_sides() -> None:
    assert low_bits.is_large(3072, 3072, 4096)
    assert not any(low_bits.is_large(*sides) for sides in ((3072, 3072, 77), (320, 30720, 4096), (1024, 1024, 1024)))


def test_what_is_asked_for_is_used_and_told_with_the_cosine(able, tiny_project, tmp_path) -> None:
    session = ready(tiny_project, tmp_path, "train.matmul=int8")
    before = gradients(session)
    assert low_bits.begin(session) is None
    assert low_linears(session) > 8 and session.progress.matmul == "int8"
    cosine = low_bits.likeness([gradients(session)], [before])
    assert 0.9 < cosine < 1
    [text] = [text for text in told(session) if "INT8" in text]
    assert text.startswith(f"{low_linears(session)} frozen layers multiply in INT8.") and "median cosine of 0.9" in text


def test_unasked_only_the_first_kind_with_the_right_gradients_is_left_to_settle(
        able, tiny_project, tmp_path, monkeypatch) -> None:
    session = ready(tiny_project, tmp_path)
    before = gradients(session)
    cosines = {"fp8": 0.9995, "int8": 0.99}
    measured, real = [], low_bits._cosine
    monkeypatch.setattr(low_bits, "_cosine", lambda session, low, expected: (
        measured.append(real(session, low, expected)), cosines[low.kind])[1])
    found = low_bits.begin(session)
    assert found.low.kind == "fp8" and "0.99950" in found.words and all(0.5 < value < 1 for value in measured)
    assert same(gradients(session), before) and not low_linears(session) and session.progress.matmul == "off"
    cosines["fp8"] = 0.998
    assert low_bits.begin(session) is None
    assert told(session)[-1].endswith("a median cosine of 0.999 with those without it: INT8 0.99000, FP8 0.99800")


class KernelError(Exception):
    """A fault of Triton's, which are no `RuntimeError`."""


@pytest.mark.parametrize("after, kept", [(0.8, True), (0.99, False), (RuntimeError("no kernel\nand more"), False),
                                         (KernelError("no kernel\nand more"), False)])
def test_products_that_are_not_faster_are_taken_back_to_the_bit(
        able, tiny_project, tmp_path, monkeypatch, after, kept: bool) -> None:
    session = ready(tiny_project, tmp_path)
    before, times = gradients(session), iter([1.0, after])
    block_compiler.install(session.denoiser)

    def seconds(session: Session) -> float:
        if isinstance(value := next(times), Exception):
            raise value
        return value

    monkeypatch.setattr(passes, "seconds", seconds)
    paths = frozenset(matmul.able_linears(session.denoiser, "int8"))
    low_bits.settle(session, Found(LowBits("int8", paths), "all right"))
    assert any(isinstance(block, block_compiler.CompiledBlock) for block in block_compiler.blocks_of(session.denoiser))
    block_compiler.remove(session.denoiser)
    assert bool(low_linears(session)) is kept is not same(gradients(session), before)
    assert session.progress.matmul == ("int8" if kept else "off") and (session.low_bits is not None) is kept
    words = "instead of 1.000 s" if not isinstance(after, Exception) else "that failed: no kernel"
    assert told(session)[-1].endswith(words)


@pytest.mark.parametrize("asked", ["auto", "int8"])
def test_a_kernel_that_fails_in_the_comparison_ends_no_run(able, tiny_project, tmp_path, monkeypatch, asked) -> None:
    session, faults = ready(tiny_project, tmp_path, f"train.matmul={asked}"), [KernelError("no kernel"), Stopped()]
    before = gradients(session)

    def product(*_: object) -> Tensor:
        raise faults[0]

    monkeypatch.setattr(LowBitLinear, "product", product)
    assert low_bits.begin(session) is None and session.progress.matmul == "off"
    assert not low_linears(session) and same(gradients(session), before)
    faults.pop(0)
    with pytest.raises(Stopped):
        low_bits.begin(session)
    assert not low_linears(session)
    assert told(session)[-1] == "Frozen layers do not multiply in 8 bits: that failed: no kernel"


def test_all_reasons_are_told_once_where_no_kind_is_possible(tiny_project, tmp_path, monkeypatch) -> None:
    session = ready(tiny_project, tmp_path)
    monkeypatch.setattr(low_bits, "obstacle", lambda session, kind: f"no {kind}")
    assert low_bits.choices(session, ["int8", "fp8"]) == ([], "no int8; no fp8")
    monkeypatch.setattr(low_bits, "obstacle", lambda session, kind: "no compiler")
    assert low_bits.choices(session, ["int8", "fp8"]) == ([], "no compiler")


def test_weights_that_are_loaded_anew_multiply_as_before_where_they_can(able, tiny_project, tmp_path) -> None:
    session = ready(tiny_project, tmp_path, "train.matmul=fp8")
    low_bits.begin(session)
    before, count = gradients(session), low_linears(session)
    reload(session)
    assert same(gradients(session), before) and low_linears(session) == count
    change(session, Plan("fp8"))
    assert low_linears(session) == count and session.denoiser.get_submodule(min(session.low_bits.paths)).turned is None
    change(session, Plan("int8"))
    assert not low_linears(session) and session.progress.matmul == "off" and "from here on" in told(session)[-1]


def test_a_run_that_is_resumed_goes_on_with_the_same_products_to_the_bit(
        able, tiny_project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(low_bits, "LIKE", -1.0)
    monkeypatch.setattr(passes, "seconds", lambda session: 0.5 if low_linears(session) else 1.0)
    whole = start(tiny_project, tmp_path, "whole")
    broken = run.create(tmp_path, "broken", whole.preset.read_text("utf-8"))
    stop_at(broken, 3)
    run_training(broken, preset.load(broken.preset), tmp_path)
    assert checkpoint.last_progress(broken).matmul == "int8"
    monkeypatch.setattr(passes, "seconds", lambda session: pytest.fail("decided anew"))
    go_on(broken)
    assert "Frozen layers multiply in INT8, as they did before" in [event["text"] for event in events(broken, "note")]
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_weights(whole.checkpoint(6) / file, broken.checkpoint(6) / file)
    for asked, left in (("train.matmul=off", "auto"), ("train.lr=1e-4", "int8")):
        other = branch.begin(tmp_path, whole, 3, branch.preset_of(whole, [asked, "train.steps=9"]))
        assert checkpoint.last_progress(other).matmul == left


def test_a_cpu_says_that_it_has_no_such_products(tiny_project, tmp_path) -> None:
    session = ready(tiny_project, tmp_path, "train.matmul=fp8")
    assert low_bits.begin(session) is None and session.progress.matmul == "off" and not low_linears(session)
    assert told(session)[-1] == ("Frozen layers do not multiply in 8 bits: that needs an NVIDIA GPU, and this run "
                                 "trains on cpu")


@pytest.mark.parametrize("change, words", [
    ("memory.device=cpu", "memory.device = 'cpu'"), ("memory.quantize=nf4", "memory.quantize = 'nf4'"),
    ("memory.quantize=int8", "memory.quantize = 'int8'"), ("memory.offload_blocks=1", "memory.offload_blocks")])
def test_what_cannot_be_is_refused_in_the_preset(tiny_project, change: str, words: str) -> None:
    with pytest.raises(UserError, match=f"train.matmul=fp8: 'fp8' does not go with {words}"):
        preset.load(tiny_project, [change, "train.matmul=fp8"])
    preset.load(tiny_project, [change])
    preset.load(tiny_project, ["memory.quantize=fp8", "train.matmul=fp8"])


def test_unasked_only_long_runs_of_transformers_are_measured(tiny_project, tmp_path, monkeypatch) -> None:
    session = ready(tiny_project, tmp_path, "train.steps=1000")
    monkeypatch.setattr(passes, "seconds", lambda session: 0.5)  # 1000 * 0.15 * s against 3 * 30
    session.device = torch.device("cuda", 0)
    assert not low_bits.may_pay(session), "a UNet"
    model, train = session.preset.model.model_copy(update={"family": "flux2"}), session.preset.train
    session.preset = session.preset.model_copy(update={"model": model})
    assert not low_bits.may_pay(session), "too quick"
    monkeypatch.setattr(passes, "seconds", lambda session: 1.0)
    assert low_bits.may_pay(session)
    exact = session.preset.model_copy(update={"train": train.model_copy(update={"deterministic": True})})
    session.preset, whole = exact, session.preset
    assert not low_bits.may_pay(session), "two runs might decide differently"
    session.preset, session.progress.step = whole, 700
    assert not low_bits.may_pay(session), "too short"
