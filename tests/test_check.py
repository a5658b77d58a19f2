"""`--check`: facts that are right, all faults at once, and not a byte written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer import check, families
from trainer import preset as presets
from trainer.session import build_adapter, open_base

CPU = torch.device("cpu")


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_good_preset_is_described_as_text(tiny_project, tmp_path, trainer) -> None:
    outcome = trainer("--preset", tiny_project, "--workspace", tmp_path, "--check")
    assert outcome.code == 0 and outcome.err == ""
    lines = dict(line.split("  ", 1) for line in outcome.out.splitlines()[:-1])
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["base model"] == "base: 3 M parameters"
    assert (facts["training images"], facts["held-out images"]) == ("7", "4")
    assert facts["buckets"] == "4 at 64×64, 3 at 88×40"
    assert (facts["steps"], facts["epochs"]) == ("6", "1.5")
    assert facts["time"] == (
        "unknown until a probe: it is measured when a run like this one trains here")
    assert outcome.out.splitlines()[-1] == "ready to train"
    assert not files(tmp_path)  # it only looks


@pytest.mark.parametrize("overrides", [
    ["adapter.method=lora"], ["adapter.method=stiefel"], ["adapter.method=stella"], ["adapter.method=trilora"],
    ["adapter.dora=true"], ['adapter.targets=["attention", "feed_forward", "projection", "text_encoder"]'],
], ids=lambda overrides: overrides[0])
def test_the_adapter_is_counted_as_it_will_be_built(tiny_project, tmp_path, overrides) -> None:
    preset = presets.load(tiny_project, overrides)
    report = check.inspect(preset, tmp_path)
    family, base = families.get("sd15"), open_base(preset)
    denoiser = family.load_denoiser(base, CPU, torch.float32)
    text_encoder = None
    if "text_encoder" in preset.adapter.targets:
        text_encoder = family.load_text_encoder(base, CPU, torch.float32)
    adapter = build_adapter(preset, family, denoiser, text_encoder, CPU)
    count = sum(leaf.numel() for leaf in adapter.parameters())
    assert report.errors == []
    assert report.facts["adapter"].endswith(f"{len(list(adapter.pairs()))} layers, {count:,} parameters")


def test_steps_follow_from_epochs(tiny_project, tmp_path) -> None:
    text = tiny_project.read_text("utf-8").replace("steps = 6", "epochs = 3", 1)
    (tmp_path / "epochs.toml").write_text(text, "utf-8")
    facts = check.inspect(presets.load(tmp_path / "epochs.toml"), tmp_path).facts
    assert (facts["steps"], facts["epochs"]) == (12, 3.0)
    facts = check.inspect(presets.load(tmp_path / "epochs.toml", ["memory.device=cuda:0,1"]), tmp_path).facts
    assert (facts["steps"], facts["epochs"]) == (6, 3.0)  # two GPUs take twice as many images a step


def test_all_of_several_gpus_must_be_there(tiny_project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    report = check.inspect(presets.load(tiny_project, ["memory.device=cuda:0,1"]), tmp_path)
    assert report.errors == ["memory.device = 'cuda:1': torch sees 1 CUDA GPUs here; choose another, or 'auto'"]


def test_all_faults_come_at_once_and_the_code_is_1(tiny_project, tmp_path, trainer) -> None:
    wrong = ["data.folder=/nowhere", "model.base=/nowhere.safetensors", "memory.device=cuda:99",
             "evaluate.inception_weights=/nowhere.pth", "evaluate.distance=inception"]
    command = ["--preset", tiny_project, "--workspace", tmp_path, "--check", *(f"--set={item}" for item in wrong)]
    text, data = trainer(*command), trainer(*command, "--json")
    assert text.code == data.code == 1 and text.err == data.err == ""
    errors = json.loads(data.out)["errors"]
    assert [line for line in text.out.splitlines() if line] == [f"error: {error}" for error in errors]
    assert [error.split(" ")[0] for error in errors] == ["there", "data.folder:", "memory.device",
                                                         "evaluate.inception_weights:"]


def test_a_faulty_preset_is_a_report_too(tiny_project, tmp_path, trainer) -> None:
    command = ["--preset", tiny_project, "--workspace", tmp_path, "--check", "--set=train.lr=-1", "--set=data.flop=1"]
    data = json.loads(trainer(*command, "--json").out)
    assert data["facts"] == {} and len(data["errors"]) == 2
    assert trainer(*command).err.splitlines() == data["errors"]


def test_what_does_not_stop_a_run_is_a_warning(own_project, tmp_path, trainer) -> None:
    train = own_project.parent / "train"
    (train / "000.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (train / "001.txt").unlink()
    text = own_project.read_text("utf-8")
    own_project.write_text("\n".join(line for line in text.splitlines() if "held" not in line), "utf-8")
    outcome = trainer("--preset", own_project, "--workspace", tmp_path / "workspace", "--check", "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 0 and report["errors"] == [] and report["facts"]["training images"] == 6
    skipped, captions, held = report["warnings"]
    assert skipped.startswith(f"{train / '000.png'} will be skipped: ")
    assert captions == "1 of 6 training images have no caption"
    assert held.startswith("no held-out images")


def test_a_rank_beyond_a_layer_is_found_without_loading_weights(tiny_project, tmp_path) -> None:
    report = check.inspect(presets.load(tiny_project, ["adapter.rank=32"]), tmp_path)
    (error,) = report.errors
    assert error.startswith("adapter.rank = 32") and "31" in error


def test_time_is_known_after_a_run_and_a_run_can_be_checked(tiny_project, tmp_path, trainer) -> None:
    assert trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=sample.prompts=[]").code == 0
    for what in (["--preset", tiny_project, "--workspace", tmp_path], ["--resume", tmp_path / "runs" / "tiny"]):
        facts = json.loads(trainer(*what, "--check", "--json").out)["facts"]
        assert "s/it" in facts["time"] and facts["time"].endswith("in all")


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(tiny_project, tmp_path) -> None:
    def peak(*overrides: str) -> float:
        report = check.inspect(presets.load(tiny_project, ["data.resolution=512", *overrides]), tmp_path)
        assert report.errors == []
        return report.numbers["peak"]

    assert peak("train.batch_size=4") > 1.5 * peak("train.batch_size=1")
    assert peak("train.batch_size=4", "memory.gradient_checkpointing=full") < peak("train.batch_size=4")


def test_what_will_be_written_is_told_and_a_full_disk_is_a_warning(tiny_project, tmp_path, trainer,
                                                                   monkeypatch) -> None:
    preset = presets.load(tiny_project, ["sample.prompts=[]"])
    before = check.inspect(preset, tmp_path)
    assert "for checkpoints" in before.facts["disk"] and before.numbers["disk"] > 0
    assert trainer("--preset", tiny_project, "--workspace", tmp_path, "--set=sample.prompts=[]").code == 0
    after = check.inspect(preset, tmp_path)
    cached = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))
    written = before.numbers["disk"] - after.numbers["disk"]  # a run later, nothing is to be cached any more
    assert 0.5 * cached < written <= cached
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    (warning,) = [text for text in check.inspect(preset, tmp_path).warnings if "disk" in text]
    assert str(tmp_path) in warning and "Free some space" in warning


def test_layers_are_counted_by_group(tiny_project, tmp_path) -> None:
    report = check.inspect(presets.load(tiny_project, ['adapter.targets=["attention"]']), tmp_path)
    counts = [int(part.split(" ")[1]) for part in report.facts["layers"].split("; ")]
    assert sum(counts) == report.numbers["layers"] == 128
    assert report.facts["layers"].startswith("down.attn1 ")


def test_missing_bitsandbytes_is_told(tiny_project, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    report = check.inspect(presets.load(tiny_project, ["train.optimizer=adamw8bit", "adapter.method=lora"]), tmp_path)
    (error,) = report.errors
    assert "needs the package bitsandbytes" in error and "train.optimizer" in error


def test_what_will_hardly_fit_is_a_warning(tiny_project, tmp_path) -> None:
    for batch, warns in ((1, False), (1024, True)):
        preset = presets.load(tiny_project, [f"train.batch_size={batch}", f"data.resolution={64 * batch ** 0.5:.0f}"])
        report = check.inspect(preset, tmp_path)
        assert any(text.startswith("this will hardly fit") for text in report.warnings) == warns, report.facts["memory"]


def test_a_warm_up_longer_than_the_epochs_is_a_fault(tiny_project, tmp_path) -> None:
    text = tiny_project.read_text("utf-8").replace("steps = 6", "epochs = 2\nwarmup_steps = 9", 1)
    (tmp_path / "epochs.toml").write_text(text, "utf-8")
    (error,) = check.inspect(presets.load(tmp_path / "epochs.toml"), tmp_path).errors
    assert error.startswith("train.warmup_steps = 9: the whole training has 8 steps")
