"""Products in 8 bits: how fast they are by themselves, and what they do to a training.

    python -m tests.bench.matmul products --json FILE
    python -m tests.bench.matmul curves --seeds 3 --workspace DIR

`products` times Flux's frozen products with an adapter's added to them, forward and for the input's gradient, in 16
bits and in 8 (with the making of codes), by the GPU's clock.
`curves` trains the shipped demo, each seed with whole products, with another seed's draws, and in each kind of 8 bits
in all layers that can, however small. It prints the mean loss of the last quarter and the validation loss (of one noise
and with the weights of the file), and how far they are from those of whole products: what another seed's draws change
is the noise that 8 bits should stay within. `--tiny` rehearses on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.memory import device_name
from tests.bench.paired import T95, spread
from tests.bench.step_time import timed
from trainer import evaluation, optim
from trainer import preset as presets
from trainer import run as runs
from trainer.fast import matmul, passes
from trainer.fast.low_bits import likeness
from trainer.fast.matmul import CODES, LowBits
from trainer.quantize.linear import rows_to_codes
from trainer.record import Recorder
from trainer.session import Session
from trainer.setup import set_up
from trainer.update import Update

Work = Callable[[], Tensor]
SHAPES = (  # rows of the input at 1024 pixels, sides of W: klein 4B, then Flux.1
    (4608, 3072, 27648), (4608, 12288, 3072), (4096, 3072, 3072), (4096, 3072, 18432), (4096, 9216, 3072),
    (512, 3072, 18432), (4608, 3072, 12288), (4608, 15360, 3072), (4096, 3072, 12288), (1024, 1280, 10240),
    (4096, 640, 5120), (1024, 1280, 1280))
RANK = 16
ARMS = ("off", "other seed", "fp8", "int8")
DEMO = Path(__file__).resolve().parents[2] / "presets" / "demo.toml"
QUIET = ("sample.prompts=[]", "evaluate.distance=off", "log.rank_every=0", "log.tensorboard=false")


# Products.


def products(options: argparse.Namespace) -> None:
    """A line for each shape: milliseconds in 16 bits, and how many times faster in 8."""
    device = torch.device("cpu" if options.tiny else "cuda:0")
    print("| rows × n → m | forward, 16 bits | fp8 | int8 | gradient, 16 bits | fp8 | int8 |\n"
          "|---|---|---|---|---|---|---|")
    for rows, n, m in [(64, 64, 96)] if options.tiny else SHAPES:
        seconds = seconds_of(rows, n, m, device)
        print(line(f"{rows} × {n} → {m}", seconds), flush=True)
        if options.json:
            with options.json.open("a") as out:
                out.write(json.dumps({"device": device_name(device), "shape": [rows, n, m], "sec": seconds}) + "\n")


def seconds_of(rows: int, n: int, m: int, device: torch.device) -> dict[str, list[float]]:
    """Of both products, in 16 bits and in 8."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, grad, weight = make(rows, n), make(rows, m), make(m, n) / n**0.5
    hidden, up, down = make(rows, RANK), make(m, RANK), make(n, RANK)
    found = {"off": [clocked(lambda: (x @ weight.t()).addmm_(hidden, up.t())),
                     clocked(lambda: (grad @ weight).addmm_(hidden, down.t()))]}
    for kind in CODES:
        if matmul.fault(kind, device) is None:
            codes, scale = rows_to_codes(weight, CODES[kind])
            found[kind] = [clocked(partial(matmul.multiplied, x, codes, scale=scale, hidden=hidden, factor=up)),
                           clocked(partial(matmul.multiplied, grad, codes.t().contiguous(), gain=scale, hidden=hidden,
                                           factor=down))]
    return found


def clocked(work: Work) -> float:
    """Median seconds of a product; on a GPU as part of a graph of ten, so that the host does not count."""
    device = work().device
    if device.type != "cuda":
        return statistics.median(timed(lambda number: work()[0, 0], device, 0, 5))
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    return statistics.median(timed(lambda number: graph.replay(), device, 0, 20)[5:]) / 10


def line(shape: str, seconds: dict[str, list[float]]) -> str:
    """A row of the table."""
    cells = []
    for part in (0, 1):
        cells.append(f"{1000 * seconds['off'][part]:.3f} ms")
        cells += [f"{seconds['off'][part] / seconds[kind][part]:.2f} ×" if kind in seconds else "" for kind in CODES]
    return f"| {shape} | {' | '.join(cells)} |"


# Curves.


def curves(options: argparse.Namespace) -> None:
    """Train each seed in each way and print what became of it."""
    print("| seed | products | cosine | loss, last quarter | validation loss | − off | validation − off |\n"
          "|---|---|---|---|---|---|---|")
    changed: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS[1:]}
    for seed in range(options.seeds):
        base: tuple[float, float] = (0.0, 0.0)
        for arm in ARMS:
            cosine, found = trained(options, arm, seed)
            base = found if arm == "off" else base
            apart = found[0] - base[0], found[1] - base[1]
            changed.get(arm, []).append(apart)
            print(f"| {seed} | {arm} | {cosine} | {found[0]:.5f} | {found[1]:.5f} "
                  f"| {apart[0]:+.5f} | {apart[1]:+.5f} |", flush=True)
    for arm, apart in changed.items():
        loss, validation = (spread(values, "+.5f") for values in zip(*apart))
        print(f"{arm} − off: loss {loss}, validation {validation}")


def trained(options: argparse.Namespace, arm: str, seed: int) -> tuple[str, tuple[float, float]]:
    """The cosine of the first gradients with whole products', the mean loss of the last quarter of the steps, and the
    validation loss."""
    session = session_of(options, arm, seed + 1000 * (arm == "other seed"))
    words, low = "", None
    if arm in CODES:
        low = LowBits(arm, frozenset(matmul.able_linears(session.denoiser, arm)))
        whole = passes.gradients(session, 2)
        matmul.try_out(session.denoiser, low)
        words = f"{likeness(passes.gradients(session, 2), whole):.5f}"
    losses = train(session)
    if low is not None:
        matmul.stop_trying(session.denoiser, low)
    again = session.preset.train.model_copy(update={"seed": seed})
    session.preset = session.preset.model_copy(update={"train": again})
    return words, (losses[-len(losses) // 4:].mean().item(), evaluation.validate(session, session.steps) or math.nan)


def train(session: Session) -> Tensor:
    """The run's steps, as the trainer's loop takes them; their losses."""
    update, losses = Update(session.adapter, session.optimizer, session.preset.train.max_grad_norm), []
    for step in range(session.steps):
        optim.set_lr(session.optimizer, session.preset.train.lr * session.schedule(step))
        loss = session.gradients(session.order.batch(step))
        update(loss)
        losses.append(loss.clone())
        session.progress.step += 1
    return torch.stack(losses).float().cpu()


def session_of(options: argparse.Namespace, arm: str, seed: int) -> Session:
    """The demo, ready to train."""
    changes = [*QUIET, *options.settings, f"train.steps={options.steps}", f"train.seed={seed}", "train.matmul=off"]
    chosen = presets.load(DEMO, changes)
    name = f"matmul-{arm.replace(' ', '-')}-{seed}"
    shutil.rmtree(options.workspace / "runs" / name, ignore_errors=True)
    run = runs.create(options.workspace, name, presets.dumps(chosen))
    device = torch.device("cpu" if options.tiny else "cuda:0")
    return set_up(run, chosen, device, options.workspace, Recorder(run, tensorboard=False), lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("products", "curves"))
    parser.add_argument("--json", type=Path, help="file that products are added to, one JSON object a line")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(T95) + 2))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--workspace", type=Path, default=Path("workspace/bench"))
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    options = parser.parse_args()
    (products if options.what == "products" else curves)(options)


if __name__ == "__main__":
    main()
