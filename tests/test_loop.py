"""The loop as a whole, on a tiny model: exact resume, requests, and what a run leaves behind."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer import preset as presets
from trainer import run as runs
from trainer.errors import UserError
from trainer.events import Event, EventReader
from trainer.loop import run_training
from trainer.run import Run
from trainer.session import Session

METHODS = ["lora", "stiefel", "stella", "trilora"]


def start(preset_file: Path, workspace: Path, name: str, *overrides: str) -> Run:
    """Train a new run to its end."""
    preset = presets.load(preset_file, overrides)
    run = runs.create(workspace, name, presets.dumps(preset))
    run_training(run, preset, workspace)
    return run


def go_on(run: Run, *overrides: str) -> None:
    run_training(run, presets.load(run.preset, overrides), run.path.parent.parent)


def events(run: Run, kind: str) -> list[Event]:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


RANDOM = ["adapter.dropout=0.2", "adapter.dora=true", 'adapter.targets=["attention", "text_encoder"]',
          "train.grad_accum=2", "train.offset_noise=0.1", "train.snr_gamma=5", "train.warmup_steps=4",
          "data.buckets=false", "data.crop=random", "data.caption_dropout=0.4"]


@pytest.mark.parametrize("chosen", [*([f"adapter.method={method}"] for method in METHODS), RANDOM],
                         ids=[*METHODS, "all that is random"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tiny_project: Path, tmp_path: Path, chosen: list[str]) -> None:
    # A step's learning rate depends on the planned steps, so the broken run is stopped, not planned shorter.
    whole = start(tiny_project, tmp_path, "whole", *chosen)
    preset = presets.load(tiny_project, chosen)
    broken = runs.create(tmp_path, "broken", presets.dumps(preset))
    stop_at(broken, 3)
    run_training(broken, preset, tmp_path)
    assert events(broken, "end")[-1]["reason"] == "stopped"
    assert broken.last_step() < 6
    go_on(broken)
    assert events(broken, "end")[-1]["reason"] == "done"
    assert_same_weights(whole.result, broken.result)
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_weights(whole.checkpoint(6) / file, broken.checkpoint(6) / file)


def stop_at(run: Run, step: int) -> None:
    """Ask for a stop as soon as a step is seen in the events, as a person would."""

    def watch() -> None:
        reader, deadline = EventReader(run.events), time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(event["kind"] == "step" and event["step"] >= step for event in reader.read()):
                run.request("stop")
                return
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()


def test_gradient_accumulation_equals_one_large_batch(tiny_project: Path, tmp_path: Path) -> None:
    plain = ["data.buckets=false", "train.steps=1", "train.optimizer=sgd", "train.lr=1", "train.max_grad_norm=0",
             "train.ema_decay=0", "output.dtype=fp32", "evaluate.every=0"]
    large = start(tiny_project, tmp_path, "large", *plain, "train.batch_size=4")
    small = start(tiny_project, tmp_path, "small", *plain, "train.batch_size=2", "train.grad_accum=2")
    first, second = load_file(large.result), load_file(small.result)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=3e-6)


def test_a_run_tells_what_it_did(tiny_project: Path, tmp_path: Path) -> None:
    run = start(tiny_project, tmp_path, "told", "sample.every=3", "sample.before=true")
    steps = events(run, "step")
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert all(event["loss"] > 0 and event["grad_norm"] > 0 and event["steps"] == 6 for event in steps)
    assert [event["step"] for event in events(run, "validation")] == [0, 3, 6]
    assert [event["step"] for event in events(run, "rank")] == [0, 3, 6]
    assert [event["step"] for event in events(run, "sample")] == [0, 3, 6]
    assert all((run.path / image).is_file() for event in events(run, "sample") for image in event["images"])
    export = events(run, "export")[-1]
    assert export["path"] == "told.safetensors" and export["unmatched"] == [] and export["worst_rel_error"] < 1e-3
    assert [path.name for path in run.path.glob("*.safetensors")] == ["told.safetensors"]
    assert run.state().word == "done"
    [started], [data] = events(run, "start"), events(run, "data")
    assert started["versions"]["torch"] == torch.__version__ and started["versions"]["diffusers"]
    assert data["images"] > 0 and data["held_out"] == 4 and len(data["sha256"]) == 16


def test_validation_uses_fixed_noise_so_that_the_same_weights_give_the_same_loss(tiny_project, tmp_path) -> None:
    first = start(tiny_project, tmp_path, "one")
    second = start(tiny_project, tmp_path, "two", "train.lr=5e-3")
    assert events(first, "validation")[0]["loss"] == events(second, "validation")[0]["loss"]
    assert events(first, "validation")[-1]["loss"] != events(second, "validation")[-1]["loss"]


def test_training_lowers_the_loss(tiny_project: Path, tmp_path: Path) -> None:
    again = shutil.copytree(tiny_project.parent / "train", tmp_path / "again")
    for file in again.glob("*.png"):  # the same pixels in other files: what is held out to the byte is not trained on
        Image.open(file).save(file, compress_level=0)
    run = start(tiny_project, tmp_path, "long", "train.steps=40", "train.lr=3e-3", "evaluate.every=0",
                "output.save_every=0", "log.rank_every=0", f"evaluate.folder={again.as_posix()}")
    losses = [event["loss"] for event in events(run, "validation")]
    assert losses[-1] < losses[0]


def test_pause_waits_and_answers_requests_and_goes_on(tiny_project: Path, tmp_path: Path) -> None:
    preset = presets.load(tiny_project)
    run = runs.create(tmp_path, "paused", presets.dumps(preset))
    run.request("pause")

    def wait_then_go_on() -> None:
        while not events(run, "paused"):
            time.sleep(0.01)
        run.request("sample", {"prompts": ["something new"]})
        while not events(run, "sample"):
            time.sleep(0.01)
        run.withdraw("pause")

    thread = threading.Thread(target=wait_then_go_on, daemon=True)
    thread.start()
    run_training(run, preset, tmp_path)
    thread.join(10)
    assert events(run, "resumed")
    asked = events(run, "sample")[0]
    assert asked["prompts"] == ["something new"] and asked["asked"]
    assert events(run, "end")[-1]["reason"] == "done"


def test_save_now_writes_a_checkpoint_and_the_file_to_use(tiny_project: Path, tmp_path: Path) -> None:
    preset = presets.load(tiny_project, ["output.save_every=0", "train.steps=8"])
    run = runs.create(tmp_path, "saved", presets.dumps(preset))

    def ask() -> None:
        while not events(run, "step"):
            time.sleep(0.002)
        run.request("save")

    threading.Thread(target=ask, daemon=True).start()
    run_training(run, preset, tmp_path)
    assert run.checkpoint_steps()[0] < 8
    assert events(run, "export")[0]["path"].startswith("exports/")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.loss_of
    monkeypatch.setattr(Session, "loss_of", lambda self, *given: real(self, *given) * (
        1.0 if self.progress.step < 4 else torch.nan))
    preset = presets.load(tiny_project, ["train.steps=20"])
    run = runs.create(tmp_path, "burst", presets.dumps(preset))
    with pytest.raises(UserError, match="3 steps in a row had no finite loss.*train.lr is too high"):
        run_training(run, preset, tmp_path)
    end = events(run, "end")[-1]
    assert end["reason"] == "error" and "last good checkpoint is step" in end["error"]
    kept = load_file(run.checkpoint(run.last_step()) / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values() if tensor.is_floating_point())
    assert [event["step"] for event in events(run, "note")] == [5, 6, 7]


def test_a_single_step_that_is_not_finite_is_skipped_and_changes_nothing(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.loss_of
    monkeypatch.setattr(Session, "loss_of", lambda self, *given: real(self, *given) * (
        torch.nan if self.progress.step == 1 else 1.0))
    run = start(tiny_project, tmp_path, "hiccup", "train.steps=2", "output.save_every=1", "output.keep=9")
    assert events(run, "end")[-1]["reason"] == "done"
    first, second = (load_file(run.checkpoint(step) / "adapter.safetensors") for step in (1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("leaf."))


def test_a_failing_sample_never_ends_a_run(tiny_project, tmp_path, monkeypatch) -> None:
    from trainer import sample

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(sample, "draw", broken)
    run = start(tiny_project, tmp_path, "blind", "sample.every=3")
    assert events(run, "end")[-1]["reason"] == "done"
    assert any("no picture today" in event["text"] for event in events(run, "note"))


def test_a_broken_image_is_named_and_skipped(own_project: Path, tmp_path: Path) -> None:
    (own_project.parent / "train" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    run = start(own_project, tmp_path, "skipping")
    (skipped,) = events(run, "skipped")
    assert skipped["file"].endswith("000.png") and skipped["reason"]


def test_a_full_disk_is_told_and_loses_nothing(tiny_project, tmp_path, monkeypatch) -> None:
    from trainer import checkpoint

    real, calls = checkpoint.save, []

    def full_once(*arguments: object) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save", full_once)
    run = start(tiny_project, tmp_path, "full")
    assert any("No space left" in event["text"] for event in events(run, "note"))
    assert run.checkpoint_steps() == [6] and events(run, "end")[-1]["reason"] == "done"


def test_epochs_become_steps(tiny_project: Path, tmp_path: Path) -> None:
    text = tiny_project.read_text("utf-8").replace("steps = 6", "epochs = 2", 1)
    preset = tmp_path / "epochs.toml"
    preset.write_text(text, "utf-8")
    run = start(preset, tmp_path, "epochs")
    # 3 wide pictures and 4 square ones, in batches of 2, filled up: 2 + 2 steps an epoch
    assert events(run, "step")[-1]["step"] == 8


def test_training_a_text_encoder_goes_without_the_text_cache(tiny_project: Path, tmp_path: Path) -> None:
    run = start(tiny_project, tmp_path, "text", 'adapter.targets=["attention", "text_encoder"]')
    keys = load_file(run.result)
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj") for key in keys)
    assert events(run, "export")[-1]["unmatched"] == []
    assert events(run, "export")[-1]["zero"] == []  # gradients reach the encoder's layers too


def test_every_sample_is_told_by_noise_level_and_by_image(tiny_project: Path, tmp_path: Path) -> None:
    run = start(tiny_project, tmp_path, "run", "train.steps=5", "train.grad_accum=2", "log.rank_every=2",
                "sample.prompts=[]")
    levels, images = events(run, "timesteps"), events(run, "image_loss")
    assert [event["step"] for event in levels] == [event["step"] for event in images] == [2, 4, 5]
    assert [sum(event["count"]) for event in levels] == [8, 8, 4]  # samples: batch 2, twice a step
    assert [sum(n for n, _ in event["images"].values()) for event in images] == [8, 8, 4]
    known = {str(path) for path in (tiny_project.parent / "train").glob("*.png")}
    assert {file for event in images for file in event["images"]} == known
    losses = [event["loss"] for event in events(run, "step")][:2]
    mean = sum(loss * n for loss, n in zip(levels[0]["loss"], levels[0]["count"]) if n) / 8
    assert mean == pytest.approx(sum(losses) / 2, rel=1e-4)
