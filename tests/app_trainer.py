"""Stands in for the trainer in the app's tests: the same command line, run folder, events and requests; no model."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image  # noqa: E402

from trainer import preset, run, runner, schema  # noqa: E402
from trainer.errors import UserError  # noqa: E402
from trainer.events import EventWriter  # noqa: E402

PROMPTS = ["a red apple", "a sailing boat"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds a step")
    parser.add_argument("--gpu", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("queue", nargs="*")
    options = parser.parse_args()
    if options.check:
        return check(preset.load(options.preset))
    if options.queue:
        return queue(options)
    try:
        if options.resume:
            ours = run.open_run(options.resume)
            if tomllib.loads(ours.preset.read_text())["data"]["folder"].endswith("missing"):
                EventWriter(ours.events).write("end", step=0, reason="error", error="data.folder does not exist")
                return 1
        else:
            checked = preset.load(options.preset)
            if checked.data.folder.endswith("missing"):
                raise UserError(f"data.folder: {checked.data.folder} does not exist")
            ours = run.create(options.workspace, options.name, preset.dumps(checked))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    with ours.hold():
        train(ours, EventWriter(ours.events), options.pace)
    return 0


def check(checked: schema.Preset) -> int:
    """A report as of a GPU; with a batch of 8 it does not fit, a batch of 64 takes long, and a batch of 9 breaks."""
    batch = checked.train.batch_size
    print("a library says something", flush=True)
    time.sleep(30 if batch == 64 else 0.3)
    if batch == 9:
        raise RuntimeError("the check broke")
    peak = 5 * 2**30 * batch
    missing = [f"data.folder: {checked.data.folder} does not exist"] if checked.data.folder.endswith("missing") else []
    warnings = ["this will hardly fit: make train.batch_size or data.resolution smaller, or leave what [memory] fixes "
                "to auto"] if batch == 8 else []
    print(json.dumps({"errors": missing, "warnings": warnings, "facts": {
        "base model": "base: 860 M parameters", "training images": 24, "held-out images": 6,
        "buckets": {"512×512": 20, "448×576": 4}, "steps": checked.train.steps, "epochs": 12.5,
        "adapter": f"{checked.adapter.method}, rank {checked.adapter.rank}, 128 layers, 1,000,000 parameters",
        "device": "cuda NVIDIA L4", "held as": "weights in FP8, gradient checkpointing",
        "GPU memory": f"about {peak / 2**30:.1f} of 22.0 GiB", "memory": "about 6.1 of 31.0 GiB",
        "disk": "80 MB for caches, 200 MB for checkpoints and files; 70.0 GB are free",
        "time": "0.31 s/it, 10 min in all"},
        "numbers": {"peak": peak, "limit": 22 * 2**30, "host": 6.1 * 2**30, "disk": 280e6, "disk_free": 70e9,
                    "sec": 600.0}}, indent=1))
    return 1 if missing else 0


def queue(options: argparse.Namespace) -> int:
    """The verb: with "run" as a runner of one GPU, without it as what starts them."""
    own = (sys.executable, __file__, "--pace", str(options.pace))
    if options.queue == ["queue", "run"]:
        runner.serve(options.workspace, options.gpu, own, dict(os.environ), print)
    else:
        runner.start_runners(options.workspace, own, dict(os.environ))
    return 0


def train(ours: run.Run, events: EventWriter, pace: float) -> None:
    first = ours.last_step()
    steps = tomllib.loads(ours.preset.read_text())["train"]["steps"]
    events.write("start", v=1, step=first, steps=steps, pid=os.getpid(), host="box", device="cpu", torch="2",
                 preset_sha="0")
    events.write("phase", name="caching latents", done=1, of=2)
    events.write("skipped", file="broken.png", reason="not an image")
    if first == 0:
        draw(ours, events, 0, PROMPTS)
        events.write("validation", step=0, loss=0.2)
    for step in range(first + 1, steps + 1):
        time.sleep(pace)
        events.write("step", step=step, steps=steps, loss=0.1 + 0.1 / step, lr=1e-4 * math.cos(step / steps), sec=pace,
                     grad_norm=0.5, vram=3 * 10**9, vram_peak=4 * 10**9, eta=(steps - step) * pace)
        if step % 10 == 0:
            events.write("rank", step=step, erank={"down": 3.0, "up": 4.0}, rank=8, stable={"down": 2.0, "up": 2.5},
                         orth_error=2e-7)
            events.write("validation", step=step, loss=0.15)
        if answer(ours, events, step):
            return
    finish(ours, events, steps)


def answer(ours: run.Run, events: EventWriter, step: int) -> bool:
    """Do what was asked for; whether to stop."""
    if ours.take("save") is not None:
        save(ours, events, step)
        export(ours, events, step, ours.exports / f"{ours.name}-{step:06d}.safetensors")
    wish = ours.take("sample")
    if wish is not None:
        draw(ours, events, step, wish.get("prompts") or PROMPTS)
    if ours.asked("pause"):
        events.write("paused", step=step)
        while ours.asked("pause") and not ours.asked("stop"):
            time.sleep(0.02)
        events.write("resumed", step=step)
    if ours.take("stop") is None:
        return False
    save(ours, events, step)
    events.write("end", step=step, reason="stopped")
    return True


def finish(ours: run.Run, events: EventWriter, step: int) -> None:
    draw(ours, events, step, PROMPTS)
    events.write("distance", step=step, extractor="EffLite0", resize="bicubic", kid=14.2, kid_low=4.1, kid_high=24.3,
                 fd=158.1, fd_floor=143.2, n_ref=48, n_gen=24, nn_cosine=0.8, base_kid=64.8, base_kid_low=50.2,
                 base_kid_high=79.9, base_fd=221.5)
    save(ours, events, step)
    export(ours, events, step, ours.result)
    events.write("end", step=step, reason="done")


def draw(ours: run.Run, events: EventWriter, step: int, prompts: list[str]) -> None:
    ours.samples.mkdir(exist_ok=True)
    names = [f"samples/{step:06d}_{index:02d}.png" for index in range(len(prompts))]
    for index, name in enumerate(names):
        Image.new("RGB", (64, 64), (60 + 40 * index, 90, 160)).save(ours.path / name)
    events.write("sample", step=step, images=names, prompts=prompts, seed=1, sec=0.1)


def save(ours: run.Run, events: EventWriter, step: int) -> None:
    ours.checkpoint(step).mkdir(parents=True, exist_ok=True)
    events.write("checkpoint", step=step, path=f"checkpoints/{ours.checkpoint(step).name}", bytes=3_100_000, sec=0.1)


def export(ours: run.Run, events: EventWriter, step: int, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"lora" * 1000)
    events.write("export", step=step, path=path.relative_to(ours.path).as_posix(), format="kohya fp16", weights="raw",
                 worst_rel_error=3.4e-4, unmatched=[], readers=["ComfyUI", "A1111"],
                 others=["diffusers applies a plain LoRA instead"])


if __name__ == "__main__":
    sys.exit(main())
