"""Images a second on several GPUs beside one: `python -m tests.bench.scaling --gpus 1 2 --model sd15 klein-4b`.

True-size models with random weights take the trainer's whole step (gradients, their mean over processes, clipping,
optimizer with retraction, average), with what the loop's processes tell each other; each number of GPUs in processes
of its own, one after the other. `--shard`: the GPUs hold the model together, each a part of it, and checkpoint it; one
GPU beside them holds it whole, checkpointed too. `--tiny` rehearses on a CPU, over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from tests.bench import memory, true_size
from tests.bench.memory import wait
from tests.bench.step_time import WARM, Row, session_of
from tests.bench.true_size import SIZES, draws
from trainer import averaging, gpu, several
from trainer.distributed import ALONE, World, join
from trainer.fast import start
from trainer.memory.blocks import repeated_blocks
from trainer.memory.meter import GIB
from trainer.memory.shards import Shards, meet
from trainer.session import Session
from trainer.update import Update

ROOT = Path(__file__).resolve().parents[2]


def build(options: argparse.Namespace, world: World, device: torch.device) -> tuple[Session, true_size.Size]:
    """A session of the model on this process's device."""
    row = Row(options.model[0], options.batch or SIZES[options.model[0]].batch,
              "full" if options.shard else "none", "none", options.method)
    size = replace(SIZES[row.size], batch=row.batch)
    dtype = torch.bfloat16
    if options.device == "cpu":
        size, dtype = replace(true_size.shrunk(size), batch=row.batch), torch.float32
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, "none", device, dtype)
    shards = share(denoiser, world, device) if options.shard and world.size > 1 else None
    session = session_of(size, options.method, ["train.ema_decay=0.99"], denoiser, device, dtype, row)
    session.offload = session.offload or shards
    session.world = world
    session.recorder = SimpleNamespace(note=lambda step, text: None, phase=lambda text: None)
    whole = replace(size, batch=size.batch * world.size)
    session.order = SimpleNamespace(batch=lambda step: draws(whole, step))
    session.averager = averaging.prepare(session)
    start.prepare(session)
    return session, size


def share(denoiser: nn.Module, world: World, device: torch.device) -> Shards:
    """Keep a part of each block of a denoiser that was made whole."""
    shards = Shards(meet(world, device), device)
    for block in repeated_blocks(denoiser):
        shards.keep(block)
    shards.open(repeated_blocks(denoiser))
    return shards


def held(session: Session, device: torch.device) -> int:
    """Bytes that this process took at most since the model was built."""
    beside = session.offload.uncounted if isinstance(session.offload, Shards) else 0
    return memory.peak(device) + beside


def measure(options: argparse.Namespace, world: World) -> dict[str, float]:
    """Images a second of all processes together, and the last loss."""
    device = torch.device("cpu" if options.device == "cpu" else f"cuda:{world.local_rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    session, size = build(options, world, device)
    gpu.free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    update = Update(session.adapter, session.optimizer, session.preset.train.max_grad_norm)
    whole = replace(size, batch=size.batch * world.size)
    loss = torch.zeros(())
    for number in range(WARM + options.steps):
        if number == WARM:
            wait(device)
            world.together(lambda: None)
            began = time.perf_counter()
        found: list[torch.Tensor] = []
        world.together(lambda number=number, found=found: found.append(
            session.gradients(draws(whole, number), coming=draws(whole, number + 1))), quick=True)
        loss = session.averager(found[0], session.seen)[0] if session.averager else found[0]
        update(loss)
        session.progress.step += 1
        world.union(())
    wait(device)
    world.together(lambda: None)
    seconds = time.perf_counter() - began
    start.finish(session)
    return {"images_sec": whole.batch * options.steps / seconds, "loss": loss.item(), "peak": held(session, device)}


def run(options: argparse.Namespace, model: str, count: int) -> dict[str, float]:
    """Measure in so many processes of their own."""
    command = [sys.executable, "-m", "tests.bench.scaling", "--worker", "--model", model, "--method", options.method,
               "--steps", str(options.steps), "--batch", str(options.batch)]
    command += ["--tiny"] if options.device == "cpu" else []
    command += ["--shard"] if options.shard else []
    processes = [subprocess.Popen(command, cwd=ROOT, env=each, stdout=subprocess.PIPE, text=True)
                 for each in several.environments(count, os.environ)]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{model} on {count}: a process failed")
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="numbers of GPUs, beginning with the base")
    parser.add_argument("--model", nargs="+", default=["sd15", "klein-4b"], choices=SIZES)
    parser.add_argument("--method", default="stella")
    parser.add_argument("--batch", type=int, default=0, help="images of a GPU at a time; 0: the model's usual number")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tiny", dest="device", action="store_const", const="cpu", default="cuda")
    parser.add_argument("--shard", action="store_true", help="let the GPUs hold the model together")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        world = join(rank, size, local) if size > 1 else ALONE
        print(json.dumps(measure(options, world)), flush=True)
        world.close()
        return
    print(f"{memory.device_name(torch.device(options.device))}, torch {torch.__version__}, {options.method}")
    print("| model | GPUs | images a second | × the first | peak GiB of one | loss |\n|---|---|---|---|---|---|")
    for model in options.model:
        rates = []
        for count in options.gpus:
            found = run(options, model, count)
            rates.append(found["images_sec"])
            print(f"| {model} | {count} | {rates[-1]:.2f} | {rates[-1] / rates[0]:.2f} | {found['peak'] / GIB:.1f} | "
                  f"{found['loss']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
