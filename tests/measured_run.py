"""A run folder with every kind of event that the Run view shows, made in no time, with its data set."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from PIL import Image

from tests.data_sets import draw
from trainer import branch
from trainer import preset as presets
from trainer import run as runs
from trainer.events import EventWriter
from trainer.run import Run

PROMPTS = ["a red apple on a table", "a sailing boat"]
BLOCKS = ("down 0", "down 1", "mid 0", "up 0", "up 1")
EMPTY = struct.pack("<Q", 2) + b"{}"  # a safetensors file without tensors


def measured(workspace: Path, name: str = "measured", steps: int = 200, planned: int = 400) -> Run:
    """A run that stopped early, as its trainer leaves it: measured every 25 steps, and saved every 50."""
    folder = workspace / "datasets" / "cats"
    if not folder.exists():
        for number in range(12):
            draw(folder / f"cat{number:02d}.png", (64, 64), number, f"sks cat number {number}")
    text = (f'[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "{folder}"\n[train]\nsteps = {planned}\n'
            f"[sample]\nprompts = {PROMPTS}\n")
    run = runs.create(workspace, name, presets.dumps(presets.complete(presets.parse(text, "p.toml"), workspace)))
    run.samples.mkdir()
    events = EventWriter(run.events)
    events.write("start", v=2, step=0, steps=planned, device="cuda", host="box", torch="2.13.0")
    sample(run, events, 0)
    for step in range(1, steps + 1):
        one_step(events, step, planned)
        if step % 25 == 0:
            measure(events, folder, step, steps)
        if step % 50 == 0:
            save(run, events, step, steps)
    events.write("best", step=steps, by="kid", value=14.2, low=4.1, high=24.3, why="It is clearly the lowest.")
    events.write("end", step=steps, reason="early", text="Validation loss has not fallen for 4 measurements.")
    events.close()
    return run


def one_step(events: EventWriter, step: int, planned: int) -> None:
    events.write("step", step=step, steps=planned, loss=0.1 + 1 / step, lr=1e-4, sec=0.8, vram=9 * 10**9,
                 vram_peak=11 * 10**9, eta=0.8 * (planned - step), grad_norm=0.4)


def measure(events: EventWriter, folder: Path, step: int, steps: int) -> None:
    """What is measured every `log.rank_every` steps."""
    share = step / steps
    events.write("rank", step=step, rank=16, erank={"down": 3 + share, "up": 4 + share},
                 stable={"down": 2.0, "up": 2.5}, orth_error=3e-7,
                 blocks={block: [2 + place + 6 * share, 1.5 + share, 0.1] for place, block in enumerate(BLOCKS)},
                 spectrum={block: [math.exp(-k / (1 + 5 * share)) for k in range(16)] for block in BLOCKS})
    events.write("timesteps", step=step, loss=[0.02 * (place + 1) * (1 - share / 2) for place in range(10)],
                 count=[10] * 10)
    events.write("image_loss", step=step, images={
        str(folder / f"cat{number:02d}.png"): [2, 3.0 if number == 7 else 0.9 + number / 20] for number in range(12)})


def save(run: Run, events: EventWriter, step: int, steps: int) -> None:
    """Samples, validation, and a checkpoint that a branch can begin at."""
    sample(run, events, step)
    loss = 0.2 - 0.1 * step / steps
    events.write("validation", step=step, loss=loss, by_quantile=[loss / 4, loss / 2, loss, 2 * loss])
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    for file in branch.TENSORS:
        (folder / file).write_bytes(EMPTY)
    (folder / branch.PROGRESS).write_text(f'{{"step": {step}}}')
    events.write("checkpoint", step=step, path=f"checkpoints/{folder.name}", bytes=31_000_000, sec=0.2)
    run.exports.mkdir(exist_ok=True)
    run.export_of(step).write_bytes(b"lora" * 1000)
    events.write("export", step=step, path=f"exports/{run.export_of(step).name}", format="U1", dtype="bf16",
                 worst_rel_error=3e-4, unmatched=[])
    events.write("distance", step=step, extractor="efflite0", resize="bicubic", kid=40 - step / 10, kid_low=30.0,
                 kid_high=45.0, fd=170.0, n_ref=48, n_gen=64, base_kid=64.8, base_kid_low=50.2, base_kid_high=79.9)


def sample(run: Run, events: EventWriter, step: int) -> None:
    names = [f"samples/{step:06d}_{index:02d}.png" for index in range(len(PROMPTS))]
    for index, name in enumerate(names):
        Image.new("RGB", (64, 64), (60 + 40 * index, 90, min(255, 60 + step))).save(run.path / name)
    events.write("sample", step=step, images=names, prompts=PROMPTS, seed=42)
