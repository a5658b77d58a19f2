"""Whole runs of every family: one from the single file is, to the bit, the one from the diffusers folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import family_runs, models, models_flux, models_sdxl
from trainer.run import Run

FILES: dict[str, Callable[[Path, Path], Path]] = {
    "sd15": models.sd15_file, "sdxl": models_sdxl.single_file, "flux1": models_flux.whole_file,
    "flux2": models_flux.whole_file}
COMPONENT = {"sd15": "unet", "sdxl": "unet", "flux1": "transformer", "flux2": "transformer"}
WITH_TEXT = ['adapter.targets=["attention", "text_encoder"]', "adapter.method=stella"]
UNFUSED = ['adapter.targets=["all"]', "adapter.method=stiefel", "adapter.fuse_qkv=false"]
SETTINGS = {"sd15": WITH_TEXT, "sdxl": WITH_TEXT, "flux1": UNFUSED, "flux2": UNFUSED}
LAYERS = {"sd15": 128, "sdxl": 136, "flux1": 34, "flux2": 28}  # of the denoiser


def last_weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint(run.checkpoint_steps()[-1]) / "adapter.safetensors")


@pytest.mark.parametrize("family", FILES)
def test_a_run_from_the_single_file_is_the_run_from_the_folder(family, tmp_path) -> None:
    folder = family_runs.MAKERS[family](tmp_path / "base")
    preset = family_runs.project(tmp_path / "project", family, folder)
    file = FILES[family](tmp_path / "tiny.safetensors", folder)
    own = [f"model.{name}={folder / name}" for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]
    first = family_runs.train(preset, tmp_path, "folder", *SETTINGS[family])
    second = family_runs.train(preset, tmp_path, "file", *SETTINGS[family], f"model.base={file}", *own)
    for run in (first, second):
        family_runs.assert_finished(run)
    family_runs.assert_resume_is_exact(second)
    weights, others = last_weights(first), last_weights(second)
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    pipe = family_runs.assert_diffusers_has_our_weights(first, preset, folder, COMPONENT[family], *SETTINGS[family],
                                                        layers=LAYERS[family])
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    adapted = [sum(hasattr(module, "lora_A") for module in encoder.modules()) for encoder in encoders if encoder]
    assert adapted == {"sd15": [18], "sdxl": [18, 18], "flux1": [0, 0], "flux2": [0]}[family]
