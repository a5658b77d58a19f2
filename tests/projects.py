"""A whole small project for tests: a tiny base model, a few captioned pictures, a preset that trains in seconds."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from tests import models
from trainer import preset as presets
from trainer import run as runs
from trainer.record import Recorder
from trainer.session import Session
from trainer.setup import set_up

SETTINGS = """\
[model]
family = "sd15"
base = "{base}"

[data]
folder = "{folder}"
resolution = 64
caption_dropout = 0.1
shuffle_tags = true
flip = true

[adapter]
method = "lora"
rank = 4

[train]
steps = 6
batch_size = 2
lr = 1e-3
ema_decay = 0.9

[sample]
prompts = ["a red circle"]
every = 0
before = false
steps = 2

[evaluate]
folder = "{held}"
every = 3
images = 2
quantiles = 2
generate = 4
distance = "off"

[output]
save_every = 3
save_minutes = 0

[log]
rank_every = 3
"""


def pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` drawings of coloured shapes, of two shapes of frame, each with a caption of tags."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(count):
        size = (64, 64) if number % 3 else (96, 48)
        image = Image.new("RGB", size, "white")
        colour = rng.choice(["red", "green", "blue", "orange"])
        ImageDraw.Draw(image).ellipse((8, 8, size[0] - 8 - number % 5, size[1] - 8), fill=colour)
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {colour} shape, circle, drawing {number}", encoding="utf-8")
    return folder


def make(folder: Path) -> Path:
    """A project below `folder`; returns its preset's path."""
    base = folder / "base"
    if not base.exists():
        models.sd15_folder(base)
    train, held = pictures(folder / "train", 7), pictures(folder / "held", 4, seed=1)
    preset = folder / "tiny.toml"
    preset.write_text(SETTINGS.format(base=base.as_posix(), folder=train.as_posix(), held=held.as_posix()), "utf-8")
    return preset


def session(preset_file: Path, workspace: Path, *overrides: str, name: str = "run", device: str = "cpu") -> Session:
    """All that a trainer of this project holds before its first step, or after its last checkpoint."""
    preset = presets.load(preset_file, overrides)
    folder = workspace / "runs" / name
    run = runs.open_run(folder) if folder.exists() else runs.create(workspace, name, presets.dumps(preset))
    return set_up(run, preset, torch.device(device), workspace, Recorder(run, tensorboard=False), lambda: None)
