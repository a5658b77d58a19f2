"""Whole little runs of any family: train, resume, sample, export, and compare the file with diffusers' own weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests import models, models_flux, models_sdxl, projects
from trainer import preset as presets
from trainer import run as runs
from trainer.events import EventReader
from trainer.loop import run_training
from trainer.run import Run

MAKERS = {"sd15": models.sd15_folder, "sdxl": models_sdxl.folder, "flux1": models_flux.flux1_folder,
          "flux2": models_flux.klein_folder}  # of a folder of each family's tiny base
METHODS = ["lora", "stiefel", "stella", "trilora"]
SMALL = ["train.steps=4", "output.save_every=2", "output.dtype=fp32", "sample.before=false", "data.resolution=64",
         "train.batch_size=1", "evaluate.images=1", "train.lr=1e-2"]


def project(folder: Path, family: str, base: Path, *lines: str) -> Path:
    """A project below `folder` for a base of this family; `lines` go into its [model] section."""
    train, held = projects.pictures(folder / "train", 4), projects.pictures(folder / "held", 1, seed=1)
    text = projects.SETTINGS.format(base=base.as_posix(), folder=train.as_posix(), held=held.as_posix())
    preset = folder / "tiny.toml"
    preset.write_text(text.replace('family = "sd15"', "\n".join([f'family = "{family}"', *lines])), "utf-8")
    return preset


def train(preset_file: Path, workspace: Path, name: str, *overrides: str) -> Run:
    preset = presets.load(preset_file, [*SMALL, *overrides])
    run = runs.create(workspace, name, presets.dumps(preset))
    run_training(run, preset, workspace)
    return run


def assert_resume_is_exact(run: Run) -> None:
    """A copy of the run as a kill after its first checkpoint leaves it, resumed, ends with the same bits."""
    copy = _cut_short(run)
    run_training(copy, presets.load(copy.preset, []), run.path.parent.parent)
    _assert_same_end(run, copy)


def assert_command_resumes_exactly(preset: Path, *overrides: str, program: Sequence[str] = ("-m", "trainer")) -> Run:
    """The same of a run that is started and resumed in processes of their own, beside its preset; returns the resumed
    one.  `program` are the interpreter's arguments that make it the trainer.

    On a GPU whether steps repeat to the bit is decided when CUDA starts.
    """
    def trainer(*arguments: object) -> None:
        done = subprocess.run([sys.executable, *program, *map(str, arguments), "--workspace", str(preset.parent)],
                              capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stderr[-2000:]

    trainer("--preset", preset, "--name", "whole", *(word for one in (*SMALL, *overrides) for word in ("--set", one)))
    run = runs.open_run(preset.parent / "runs" / "whole")
    copy = _cut_short(run)
    trainer("--resume", copy.path)
    _assert_same_end(run, copy)
    return copy


def _cut_short(run: Run) -> Run:
    """A copy of a run without its last checkpoint."""
    copy = runs.open_run(shutil.copytree(run.path, run.path.with_name(f"{run.name}-again")))
    shutil.rmtree(copy.checkpoint(run.checkpoint_steps()[-1]))
    return copy


def _assert_same_end(run: Run, copy: Run) -> None:
    last = run.checkpoint_steps()[-1]
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        first, second = (load_file(one.checkpoint(last) / file) for one in (run, copy))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def assert_diffusers_has_our_weights(run: Run, preset_file: Path, base: Path, component: str, *overrides: str,
                                     layers: int, without: Sequence[str] = ()) -> DiffusionPipeline:
    """The run's file, loaded and fused by the base's own pipeline, changes every trained layer exactly as trained."""
    session = projects.session(preset_file, run.path.parent.parent, *SMALL, *overrides, name=run.name)
    pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, local_files_only=True,
                                             **{name: None for name in without})
    pipe.set_progress_bar_config(disable=True)
    model = getattr(pipe, component)
    before = {path: weight.clone() for path, weight in model.state_dict().items()}
    pipe.load_lora_weights(run.result)
    adapted = [path for path, module in model.named_modules() if hasattr(module, "lora_A")]
    pipe.fuse_lora()
    paths = {module: path for path, module in session.denoiser.named_modules()}
    targets = [target for target in session.adapter.layout.targets if target.modules[0] in paths]
    reached = [paths[module] for target in targets for module in target.modules]
    assert sorted(reached) == sorted(adapted) and len(reached) == layers
    for target in targets:
        found = torch.cat([model.get_submodule(paths[module]).base_layer.weight - before[f"{paths[module]}.weight"]
                           for module in target.modules])
        expected = session.adapter.delta(target.name, session.shown_weights)
        assert expected.norm() > 0
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-4)
    return pipe


def event(run: Run, kind: str) -> dict:
    return [event for event in EventReader(run.events).read() if event["kind"] == kind][-1]


def assert_finished(run: Run) -> None:
    """Trained with finite losses, sampled, validated, and exported without a module left over."""
    assert event(run, "end")["reason"] == "done"
    losses = [item["loss"] for item in EventReader(run.events).read() if item["kind"] == "step"]
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)
    assert len(event(run, "sample")["images"]) == 1 and event(run, "validation")["loss"] > 0
    exported = event(run, "export")
    assert exported["unmatched"] == [] and exported["worst_rel_error"] < 1e-6
