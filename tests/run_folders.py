"""Run folders as a trainer leaves them, made in no time, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import preset as presets
from trainer import run as runs
from trainer.events import EventWriter
from trainer.run import Run

PRESET = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = 100\n'


def finished(workspace: Path, name: str, *overrides: str, validation: float | None = None,
             kid: tuple[float, float, float] | None = None, steps: int = 100, **distance: Any) -> Run:
    """A run that is done, with what it measured at its end."""
    preset = presets.complete(presets.parse(PRESET, "p.toml", overrides), workspace)
    run = runs.create(workspace, name, presets.dumps(preset))
    events = EventWriter(run.events)
    events.write("start", v=2, step=0, steps=steps, device="CPU", host="box", torch="2.13.0")
    for step in range(1, steps + 1):
        events.write("step", step=step, steps=steps, loss=1.0 / step, lr=1e-4, sec=0.5, ram=10**9 + step,
                     vram_peak=4 * 10**9)
        if step % 50 == 0 and validation is not None:
            events.write("validation", step=step, loss=validation + (steps - step) * 1e-3, by_quantile=[validation])
    if kid:
        fields = {"extractor": "efflite0", "resize": "bicubic", "n_ref": 48, "n_gen": 24} | distance
        events.write("distance", step=steps, kid=kid[0], kid_low=kid[1], kid_high=kid[2], fd=158.1, fd_floor=143.2,
                     **fields)
    events.write("rank", step=steps, rank=8, erank={"up": 3.0, "down": 5.0}, stable={"up": 2.0, "down": 2.0})
    run.result.write_bytes(b"lora" * 1000)
    events.write("export", step=steps, path=run.result.name, format="U1", worst_rel_error=3.4e-4, unmatched=[])
    events.write("end", step=steps, reason="done", trained_sec=60.0)
    events.close()
    return run
