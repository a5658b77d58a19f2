"""Products in 8 bits are chosen by what is measured, told, remembered by a resume, and taken back without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import projects
from tests.test_fast_attention import out_of_memory
from tests.test_loop import assert_same_weights, events, go_on, start, stop_at
from trainer import branch, checkpoint, preset, run
from trainer.control import Stopped
from trainer.errors import UserError
from trainer.fast import low_bits, passes
from trainer.fast import start as fast
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
    low_bits.choose(session)
    assert low_linears(session) > 8 and session.progress.matmul == "int8"
    cosine = low_bits.likeness([gradients(session)], [before])
    assert 0.9 < cosine < 1
    [text] = [text for text in told(session) if "INT8" in text]
    assert text.startswith(f"{low_linears(session)} frozen layers multiply in INT8.") and "median cosine of 0.9" in text


def test_unasked_the_first_kind_that_is_right_and_faster_is_used(able, tiny_project, tmp_path, monkeypatch) -> None:
    session = ready(tiny_project, tmp_path)
    before = gradients(session)
    cosines = {"fp8": 0.998, "int8": 0.99}
    measured, real = [], low_bits._cosine
    monkeypatch.setattr(low_bits, "_cosine", lambda session, low, expected: (
        measured.append(real(session, low, expected)), cosines[low.kind])[1])
    monkeypatch.setattr(low_bits, "product_seconds", lambda session, low: [1.0, 0.8 if low.kind == "fp8" else 1.1])
    low_bits.choose(session)
    assert same(gradients(session), before) and not low_linears(session) and session.progress.matmul == "off"
    cosines["fp8"], cosines["int8"] = 0.9995, 0.9999
    low_bits.choose(session)
    assert session.progress.matmul == "fp8" and all(0.5 < value < 1 for value in measured) and low_linears(session)
    refused, used = told(session)[-2:]
    assert refused.endswith(
        "8 bits: with INT8 the adapter's gradients have a median cosine of 0.99000 with those without it, and 0.999 is "
        "the least; with FP8 the adapter's gradients have a median cosine of 0.99800 with those without it, and 0.999 "
        "is the least")
    assert used.endswith("0.99950 with those without it, and their products take 0.800 s of a step instead of 1.000 s")


class KernelError(Exception):
    """A fault of Triton's, which are no `RuntimeError`."""


@pytest.mark.parametrize("after, words", [
    (0.95, "INT8 would not be faster: their products take 0.950 s of a step instead of 1.000 s; FP8 would not be "
           "faster: their products take 0.950 s of a step instead of 1.000 s"),
    (KernelError("no kernel\nand more"), "that failed: no kernel")])
def test_unasked_products_that_are_not_faster_are_left(able, tiny_project, tmp_path, monkeypatch, after, words) -> None:
    session = ready(tiny_project, tmp_path)
    before = gradients(session)

    def seconds(session: Session, low: LowBits) -> list[float]:
        if isinstance(after, Exception):
            raise after
        return [1.0, after]

    monkeypatch.setattr(low_bits, "LIKE", -1.0)
    monkeypatch.setattr(low_bits, "product_seconds", seconds)
    low_bits.choose(session)
    assert not low_linears(session) and same(gradients(session), before)
    assert session.progress.matmul == "off" and session.low_bits is None
    assert told(session)[-1] == f"Frozen layers do not multiply in 8 bits: {words}"


@pytest.mark.parametrize("store", ["none", "int8"])
def test_each_shape_is_timed_once_for_all_its_layers(able, tiny_project, tmp_path, monkeypatch, store) -> None:
    session = ready(tiny_project, tmp_path)
    change(session, Plan(store))
    low = LowBits("int8", low_bits.large_layers(session, "int8"))
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(passes, "clocked", lambda work, device: sizes.append(tuple(work().shape)) or 1.0)
    assert low_bits.product_seconds(session, low) == [2.0 * len(low.paths)] * 2
    rows = passes.rows_of_inputs(session, low.paths)
    layers = {path: session.denoiser.get_submodule(path) for path in low.paths}
    assert set(sizes) == {(rows[path], side) for path, layer in layers.items()
                          for side in (layer.in_features, layer.out_features)}
    shapes = {(layer.in_features, layer.out_features, rows[path]) for path, layer in layers.items()}
    assert len(sizes) == 4 * len(shapes) < 4 * len(layers)


@pytest.mark.parametrize("asked", ["auto", "int8"])
def test_a_kernel_that_fails_in_the_comparison_ends_no_run(able, tiny_project, tmp_path, monkeypatch, asked) -> None:
    session, faults = ready(tiny_project, tmp_path, f"train.matmul={asked}"), [KernelError("no kernel"), Stopped()]
    before = gradients(session)

    def product(*_: object) -> Tensor:
        raise faults[0]

    monkeypatch.setattr(LowBitLinear, "product", product)
    low_bits.choose(session)
    assert session.progress.matmul == "off"
    assert not low_linears(session) and same(gradients(session), before)
    faults.pop(0)
    with pytest.raises(Stopped):
        low_bits.choose(session)
    assert not low_linears(session)
    assert told(session)[-1] == "Frozen layers do not multiply in 8 bits: that failed: no kernel"


@pytest.mark.parametrize("function", ["obstacle", "large_layers"])
def test_want_of_memory_while_finding_out_ends_no_run(able, tiny_project, tmp_path, monkeypatch, function) -> None:
    session = ready(tiny_project, tmp_path, "train.matmul=int8")
    monkeypatch.setattr(low_bits, function, out_of_memory)
    assert low_bits.choose(session) == "there was not memory enough to find out whether they can"
    assert session.progress.matmul == "off"


def test_all_reasons_are_told_once_where_no_kind_is_possible(tiny_project, tmp_path, monkeypatch) -> None:
    session = ready(tiny_project, tmp_path)
    monkeypatch.setattr(low_bits, "obstacle", lambda session, kind: f"no {kind}")
    assert low_bits.choices(session, ["int8", "fp8"]) == ([], "no int8; no fp8")
    monkeypatch.setattr(low_bits, "obstacle", lambda session, kind: "no compiler")
    assert low_bits.choices(session, ["int8", "fp8"]) == ([], "no compiler")


def test_weights_that_are_loaded_anew_multiply_as_before_where_they_can(able, tiny_project, tmp_path) -> None:
    session = ready(tiny_project, tmp_path, "train.matmul=fp8")
    low_bits.choose(session)
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
    monkeypatch.setattr(low_bits, "product_seconds", lambda session, low: [1.0, 0.5])
    whole = start(tiny_project, tmp_path, "whole")
    broken = run.create(tmp_path, "broken", whole.preset.read_text("utf-8"))
    stop_at(broken, 3)
    run_training(broken, preset.load(broken.preset), tmp_path)
    assert checkpoint.last_progress(broken).matmul == "int8"
    monkeypatch.setattr(low_bits, "compare", lambda *_: pytest.fail("decided anew"))
    go_on(broken)
    assert "Frozen layers multiply in INT8, as they did before" in [event["text"] for event in events(broken, "note")]
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_weights(whole.checkpoint(6) / file, broken.checkpoint(6) / file)
    for asked, left in (("train.matmul=off", "auto"), ("train.lr=1e-4", "int8")):
        other = branch.begin(tmp_path, whole, 3, branch.preset_of(whole, [asked, "train.steps=9"]))
        assert checkpoint.last_progress(other).matmul == left


def test_a_cpu_says_that_it_has_no_such_products(tiny_project, tmp_path) -> None:
    session = ready(tiny_project, tmp_path, "train.matmul=fp8")
    fast.prepare(session)
    assert session.progress.matmul == "off" and not low_linears(session)
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
    monkeypatch.setattr(passes, "seconds", lambda session: 0.1)  # 1000 * 0.15 * s against 3 * 10
    session.device = torch.device("cuda", 0)
    assert not low_bits.may_pay(session), "a UNet"
    model, train = session.preset.model.model_copy(update={"family": "flux2"}), session.preset.train
    session.preset = session.preset.model_copy(update={"model": model})
    assert not low_bits.may_pay(session), "too quick"
    monkeypatch.setattr(passes, "seconds", lambda session: 1.0)
    assert low_bits.may_pay(session)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "seconds", out_of_memory)
        assert not low_bits.may_pay(session), "the first step does not fit"
    exact = session.preset.model_copy(update={"train": train.model_copy(update={"deterministic": True})})
    session.preset, whole = exact, session.preset
    assert not low_bits.may_pay(session), "two runs might decide differently"
    session.preset, session.progress.step = whole, 700
    assert not low_bits.may_pay(session), "too short"
