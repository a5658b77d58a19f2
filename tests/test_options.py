"""Every option of the methods, from the preset to the run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_loop import assert_same_weights, events, go_on, start, stop_at
from tests.tiny import adapted
from trainer import check, families
from trainer import preset as presets
from trainer import run as runs
from trainer import session as sessions
from trainer.adapters import median_size
from trainer.adapters.step_rule import PairPreconditioner
from trainer.errors import UserError
from trainer.loop import run_training

CPU = torch.device("cpu")
QUIET = ("evaluate.every=0", "log.rank_every=0", "sample.prompts=[]")


@pytest.fixture(scope="module")
def built(tiny_project):
    """The adapter of the tiny project under some settings."""
    preset = presets.load(tiny_project)
    base = sessions.open_base(preset)

    def build(*overrides: str) -> sessions.Adapter:
        denoiser = families.get("sd15").load_denoiser(base, CPU, torch.float32)
        return sessions.build_adapter(presets.load(tiny_project, overrides), families.get("sd15"), denoiser, None, CPU)

    return build


def test_the_options_of_stella_reach_the_adapter(built) -> None:
    plain = built("adapter.method=stella")
    assert plain.step_rule.scale_dim == median_size(plain.layout.targets) and plain.leaves["core"].ndim == 3
    other = built("adapter.method=stella", "adapter.scale_dim=320", "adapter.diagonal=true")
    assert other.step_rule.scale_dim == 320 and other.leaves["core"].ndim == 2
    assert built("adapter.method=stella", "adapter.gradient_scaling=false").step_rule.scale(32) == 1.0


def test_convolutions_are_adapted_as_matrices(built) -> None:
    layout = built('adapter.targets=["convolution"]').layout
    assert all(target.convolution for target in layout.targets) and len(layout.targets) == 63  # 64 in SD 1.5
    assert {target.columns // target.inputs for target in layout.targets} == {1, 9}
    assert {target.group for target in layout.targets} == {"down.conv", "mid.conv", "up.conv"}


def options_of(tiny_project: Path, *overrides: str) -> torch.optim.Optimizer:
    preset = presets.load(tiny_project, overrides)
    return sessions.build_optimizer(preset, adapted(preset.adapter.method)[1])


def test_the_options_of_the_optimizers_reach_them(tiny_project) -> None:
    adamw = options_of(tiny_project, "train.beta1=0.8", "train.beta2=0.95", "train.up_lr_ratio=16")
    assert adamw.defaults["betas"] == (0.8, 0.95)
    assert {group["role"]: group["ratio"] for group in adamw.param_groups} == {"up": 16, "down": 1}
    stiefel = options_of(tiny_project, "adapter.method=stiefel", "train.momentum=0.8", "train.gradient_weight=100",
                         "train.weight_decay=0.1", "train.cautious=true")
    assert (stiefel.momentum, stiefel.gradient_weight, stiefel.decay, stiefel.cautious) == (0.8, 100, 0.1, True)
    plain = options_of(tiny_project, "adapter.method=stiefel")
    assert (plain.momentum, plain.gradient_weight, plain.decay, plain.cautious) == (0.95, None, 0, False)
    assert options_of(tiny_project, "train.optimizer=sgd", "train.momentum=0.5").defaults["momentum"] == 0.5
    assert options_of(tiny_project, "train.optimizer=sgd").defaults["momentum"] == 0.9


def test_scaled_adamw_preconditions(tiny_project) -> None:
    preset, (_, adapter) = presets.load(tiny_project, ["train.optimizer=scaled_adamw"]), adapted("lora")
    sessions.build_optimizer(preset, adapter)
    assert isinstance(adapter.step_rule, PairPreconditioner)


@pytest.mark.parametrize("overrides", [
    ["adapter.method=stella", "adapter.diagonal=true"], ["adapter.method=trilora", "adapter.diagonal=true"],
    ['adapter.targets=["convolution"]', "adapter.dora=true"], ["train.optimizer=scaled_adamw"],
], ids=lambda overrides: overrides[-1])
def test_the_check_counts_what_is_built(tiny_project, tmp_path, built, overrides) -> None:
    report = check.inspect(presets.load(tiny_project, overrides), tmp_path)
    count = sum(leaf.numel() for leaf in built(*overrides).parameters())
    assert report.errors == [] and report.facts["adapter"].endswith(f"layers, {count:,} parameters")


def test_the_turn_of_a_step_is_told_by_check_and_run(tiny_project, tmp_path) -> None:
    overrides = ("adapter.method=stella", "adapter.scale_dim=100", "train.lr=2e-3", "train.steps=1", *QUIET)
    facts = check.inspect(presets.load(tiny_project, overrides), tmp_path).facts
    assert facts["gradient scaling"] == "d = 100, lr·√d = 0.02"
    run = start(tiny_project, tmp_path, "told", *overrides)
    assert [note["text"].split(":")[1] for note in events(run, "note")] == [" d = 100, lr·√d = 0.02"]


def test_convolutions_train_and_are_exported(tiny_project, tmp_path) -> None:
    run = start(tiny_project, tmp_path, "conv", "adapter.method=stella", 'adapter.targets=["convolution"]', *QUIET)
    assert events(run, "export")[-1]["unmatched"] == []
    tensors = load_file(run.result)
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (4, 64, 3, 3)
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"].shape == (64, 4, 1, 1)


# Continuing a file


@pytest.fixture(scope="module")
def first(tiny_project, tmp_path_factory) -> runs.Run:
    """A finished run whose file others continue."""
    return start(tiny_project, tmp_path_factory.mktemp("first"), "first", "output.dtype=fp32", "log.rank_every=0")


@pytest.mark.parametrize("method", ["lora", "stiefel", "stella", "trilora"])
def test_any_method_continues_a_file_where_it_ended(tiny_project, tmp_path, first, method) -> None:
    run = start(tiny_project, tmp_path, "next", f"adapter.method={method}", f"adapter.start_from={first.result}",
                "train.lr=1e-3")
    assert events(run, "validation")[0]["loss"] == pytest.approx(events(first, "validation")[-1]["loss"], rel=1e-5)
    note = events(run, "note")[0]["text"]
    assert note == f"continues {first.result}: 128 of 128 layers, rank 4"
    assert presets.load(run.preset).adapter.start_from == str(first.result)
    assert events(run, "end")[-1]["reason"] == "done"


@pytest.mark.parametrize("rank, said", [(6, "rank 4, filled up to 6"), (2, "rank 4, cut to 2 by the SVD")])
def test_a_file_is_continued_at_another_rank(tiny_project, tmp_path, first, rank, said) -> None:
    run = start(tiny_project, tmp_path, "next", "adapter.method=stella", f"adapter.start_from={first.result}",
                f"adapter.rank={rank}", "train.steps=1", "log.rank_every=0")
    assert events(run, "note")[0]["text"].endswith(said)
    after, before = events(first, "validation")[-1]["loss"], events(first, "validation")[0]["loss"]
    exact = 1e-5 if rank > 4 else abs(after - before)
    assert events(run, "validation")[0]["loss"] == pytest.approx(after, abs=exact)


def test_a_resume_does_not_need_the_file_any_more(tiny_project, tmp_path, first) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(first.result.read_bytes())
    preset = presets.load(tiny_project, [f"adapter.start_from={file}", *QUIET])
    run = runs.create(tmp_path, "next", presets.dumps(preset))
    stop_at(run, 2)
    run_training(run, preset, tmp_path)
    file.unlink()
    go_on(run)
    assert events(run, "end")[-1]["reason"] == "done" and run.last_step() == 6


def test_check_tells_what_would_be_continued_and_what_cannot(tiny_project, tmp_path, first) -> None:
    preset = presets.load(tiny_project, [f"adapter.start_from={first.result}"])
    assert check.inspect(preset, tmp_path).facts["continues"] == f"{first.result}, 128 layers"
    other = [f"adapter.start_from={first.result}", 'adapter.targets=["feed_forward"]']
    (error,) = check.inspect(presets.load(tiny_project, other), tmp_path).errors
    said = f"adapter.start_from: {first.result}: the LoRA has layers that this run does not train, such as unet."
    assert error.startswith(said)
    with pytest.raises(UserError, match=re.escape(said)):
        start(tiny_project, tmp_path, "other", *other)
    with pytest.raises(UserError, match="adapter.start_from: no file /nowhere/a.safetensors"):
        start(tiny_project, tmp_path, "none", "adapter.start_from=/nowhere/a.safetensors")


@pytest.mark.parametrize("change, said", [("adapter.method=stella", "the saved adapter was made"), (
    "train.optimizer=sgd", "the saved optimizer state is of another optimizer")])
def test_a_checkpoint_that_does_not_fit_is_named(tiny_project, tmp_path, first, change, said) -> None:
    run = runs.Run(shutil.copytree(first.path, tmp_path / "runs" / "first"))
    with pytest.raises(UserError, match=re.escape(f"{run.checkpoint(6)}: {said}")):
        run_training(run, presets.load(run.preset, [change]), tmp_path)


# A rank that falls

FALLING = ("adapter.method=stella", "adapter.diagonal=true", "adapter.rank_target=2", "train.steps=10",
           "output.keep=10")


def test_a_falling_rank_ends_at_its_target_and_survives_a_stop_to_the_bit(tiny_project, tmp_path) -> None:
    whole = start(tiny_project, tmp_path, "whole", *FALLING, *QUIET)
    pruned = load_file(whole.checkpoint(10) / "adapter.safetensors")["pruned"].bool()
    assert (~pruned).sum(1).float().mean() == 2 and (~pruned).sum(1).min() >= 1
    early = load_file(whole.checkpoint(3) / "adapter.safetensors")["pruned"].bool()
    assert 2 < (~early).sum(1).float().mean() <= 4
    preset = presets.load(tiny_project, [*FALLING, *QUIET])
    broken = runs.create(tmp_path, "broken", presets.dumps(preset))
    stop_at(broken, 4)
    run_training(broken, preset, tmp_path)
    assert broken.last_step() < 10
    go_on(broken)
    assert_same_weights(whole.result, broken.result)
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_weights(whole.checkpoint(10) / file, broken.checkpoint(10) / file)
