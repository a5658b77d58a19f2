"""Peak memory and step time of true-size models with random weights: `python -m tests.bench.memory --all`.

Each case is a process of its own that takes the trainer's real steps; its row is written as soon as it is done.
`--case NAME` runs one here, `--list` names them, `--tiny` rehearses on a CPU. `--table FILE…` puts rows together, with
what the trainer's estimate says of each; it needs no GPU. `memory_h200.jsonl` holds the rows of presets/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.bench import peer, true_size
from tests.bench.apart import run_apart
from tests.bench.true_size import SIZES, Size
from trainer.gpu import free_memory
from trainer.memory.blocks import repeated_blocks
from trainer.memory.estimate import Estimator
from trainer.memory.plan import Plan
from trainer.session import hold
from trainer.update import Update

GIB = 2**30
RANK = 16
QUANTIZE = ("none", "fp8", "nf4", "int8")
MODES = ("plain", "selective", "full", "offload")  # how much is checkpointed; and all blocks but one on the host
PEERS_MODES = ("plain", "full")
FIRST = ("klein-4b:nf4:full", "klein-4b:none:full", "klein-9b:nf4:full", "flux1-dev:nf4:full", "flux1-dev:nf4:offload",
         "sdxl:none:full", "sd15:none:full", "klein-4b:none:plain", "klein-4b:none:plain:peer",
         "klein-4b:none:full:peer", "sdxl:none:plain", "sdxl:none:plain:peer", "sd15:none:plain",
         "sd15:none:plain:peer")
TARGETS = {"klein-4b:nf4:full": 6.0, "klein-4b:none:full": 10.0, "klein-9b:nf4:full": 9.0, "flux1-dev:nf4:full": 10.0,
           "flux1-dev:nf4:offload": 8.0, "sdxl:none:full": 7.0, "sd15:none:full": 3.5}  # GiB at most


@dataclass(frozen=True)
class Case:
    """A row: model, how its weights are held, how its activations are, ours or the peer's."""

    size: str
    quantize: str
    mode: str
    peer: bool = False

    @property
    def name(self) -> str:
        return ":".join([self.size, self.quantize, self.mode, *(["peer"] if self.peer else [])])


def case_of(name: str) -> Case:
    """The case of a name such as klein-4b:nf4:full."""
    size, quantize, mode, *rest = name.split(":")
    if size not in SIZES or quantize not in QUANTIZE or mode not in MODES or rest not in ([], ["peer"]):
        raise SystemExit(f"there is no case {name}: --list names them")
    return Case(size, quantize, mode, bool(rest))


def all_cases() -> list[Case]:
    """Every case; what has a figure to hold comes first, what is seldom used last."""
    names = list(FIRST)
    for mode in MODES:
        for quantize in QUANTIZE[:3]:
            names += [f"{size}:{quantize}:{mode}" for size in SIZES if size != "flux2-dev"]
    names += ["flux1-dev:none:full:peer", "klein-9b:none:full:peer", "flux2-dev:nf4:offload"]
    names += [f"{size}:int8:{mode}" for mode in MODES for size in SIZES if size != "flux2-dev"]
    return [case_of(name) for name in dict.fromkeys(names)]


# One case.


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Build the model, take the steps, and say what they took."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = true_size.shrunk(SIZES[case.size]) if options.tiny else SIZES[case.size]
    started = time.perf_counter()
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()
    row = asdict(case) | {"name": case.name, "device": device_name(device), "torch": torch.__version__,
                          "method": "lora" if case.peer else options.method, "batch": size.batch,
                          "resolution": size.resolution}
    step, facts = (peer_step if case.peer else our_step)(case, size, device, dtype, options.method)
    row |= facts | {"build_peak": peak(device), "held": held(device), "build_sec": time.perf_counter() - started}
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = run_steps(step, device, options.warm, options.steps)
    return row | {"peak": peak(device), "reserved": reserved(device), "sec": statistics.median(seconds),
                  "secs": seconds, "loss": losses[-1], "finite": all(map(math.isfinite, losses)),
                  "host_rss": psutil.Process().memory_info().rss}


Step = Callable[[int], torch.Tensor]  # number -> loss


def our_step(case: Case, size: Size, device: torch.device, dtype: torch.dtype, method: str) -> tuple[Step, dict]:
    """The trainer's own step."""
    chosen = true_size.preset_of(size, method, RANK)
    denoiser = true_size.denoiser_of(size, case.quantize, device, dtype)
    blocks = repeated_blocks(denoiser)
    plan = plan_of(case, len(blocks))
    session = true_size.session_of(size, chosen, denoiser, device, dtype)
    session.offload = hold(session.family, denoiser, plan, device)
    update = Update(session.adapter, session.optimizer, chosen.train.max_grad_norm)

    def step(number: int) -> torch.Tensor:
        loss = session.gradients(true_size.draws(size, number))
        update(loss)
        return loss

    return step, {"blocks": len(blocks), "offloaded": plan.offload_blocks,
                  "trained": sum(leaf.numel() for leaf in session.adapter.parameters()),
                  "host_bytes": session.offload.host_bytes if session.offload else 0}


def plan_of(case: Case, blocks: int) -> Plan:
    """How a case holds its model: offloaded, all blocks but one are."""
    level = {"plain": "none", "offload": "full"}.get(case.mode, case.mode)
    return Plan(case.quantize, level, blocks - 1 if case.mode == "offload" else 0)


def peer_step(case: Case, size: Size, device: torch.device, dtype: torch.dtype, method: str) -> tuple[Step, dict]:
    """The peer's step for the same work."""
    if case.quantize != "none" or case.mode not in PEERS_MODES:
        raise SystemExit(f"{case.name}: the peer is measured in 16 bits, with all checkpointing or none")
    denoiser = true_size.denoiser_of(size, "none", device, dtype)
    built = peer.build(size, denoiser, RANK, case.mode == "full", device, dtype, *true_size.batch_of(size, dtype))
    return built.step, {"trained": built.trained}


def run_steps(step: Step, device: torch.device, warm: int, timed: int) -> tuple[list[float], list[float]]:
    """Losses of all steps and seconds of the timed ones."""
    losses, seconds = [], []
    for number in range(warm + timed):
        wait(device)
        started = time.perf_counter()
        loss = step(number)
        wait(device)
        if number >= warm:
            seconds.append(time.perf_counter() - started)
        losses.append(loss.float().item())
    return losses, seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# Many cases.


def run_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All matching cases one after the other, until the time is over or three in a row have failed."""
    ends, failed = time.monotonic() + options.minutes * 60, 0
    with closing(run_apart([case for case in all_cases() if re.search(options.match, case.name)], options,
                           measure)) as rows:
        for row in rows:
            failed = failed + 1 if "error" in row else 0
            yield row
            if time.monotonic() > ends or failed == 3:
                return


# Showing.


def line(row: dict[str, Any], predicted: int | None = None) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| {row['name']} | {row['error']} |"
    target = TARGETS.get(row["name"])
    told = [f"{row['peak'] / GIB:.2f}" + (f" (≤ {target:g})" if target else ""), f"{row['reserved'] / GIB:.2f}",
            f"{row['build_peak'] / GIB:.2f}", f"{row['sec']:.3f}", "yes" if row["finite"] else "NO",
            f"{predicted / GIB:.2f}" if predicted else "",
            f"{predicted / row['peak']:.3f}" if predicted and row["peak"] else ""]
    return f"| {row['name']} | {' | '.join(told)} |"


class Predictions:
    """What the trainer's estimate says of our rows."""

    def __init__(self) -> None:
        self.estimators: dict[tuple[str, str], Estimator] = {}

    def __call__(self, row: dict[str, Any]) -> int | None:
        if "error" in row or row["peer"]:
            return None
        key = row["size"], row["method"]
        if key not in self.estimators:
            size = SIZES[row["size"]]
            self.estimators[key] = Estimator(true_size.preset_of(size, row["method"], RANK),
                                             true_size.skeleton(size), torch.bfloat16)
        return self.estimators[key](plan_of(case_of(row["name"]), row["blocks"])).peak


def grid(rows: list[dict[str, Any]]) -> str:
    """The table of presets/README.md: a line for each model and way to hold its weights."""
    found = {row["name"]: row for row in rows if "error" not in row}
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in found.values())]

    def cell(*name: str) -> str:
        row = found.get(":".join(name))
        return f"{row['peak'] / GIB:.1f} · {row['sec']:.3f} s" if row else ""

    lines = []
    for size, shown in SHOWN.items():
        for quantize, called in (("none", "bf16"), ("fp8", "FP8"), ("nf4", "NF4")):
            cells = [shown, called, *(cell(size, quantize, mode) for mode in modes),
                     *(cell(size, quantize, mode, "peer") for mode in PEERS_MODES)]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


SHOWN = {"sd15": "SD 1.5", "sdxl": "SDXL", "klein-4b": "Flux.2 klein 4B", "klein-9b": "Flux.2 klein 9B",
         "flux1-dev": "Flux.1 dev"}
HEAD = ("| case | peak GiB | reserved | while building | s/it | finite | predicted | ratio |\n"
        "|---|---|---|---|---|---|---|---|")


def rows_of(files: list[Path]) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    return [json.loads(text) for file in files for text in file.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--case", help="one case, in this process")
    chosen.add_argument("--all", action="store_true", help="all cases, each in a process of its own")
    chosen.add_argument("--list", action="store_true")
    chosen.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="rows of earlier runs as a table")
    chosen.add_argument("--grid", nargs="+", type=Path, metavar="FILE", help="the table of presets/README.md")
    parser.add_argument("--match", default="", help="regular expression: only the cases in whose names it is found")
    parser.add_argument("--json", type=Path, help="file that rows are added to, one JSON object a line")
    parser.add_argument("--method", default="stella", choices=["stella", "stiefel", "lora", "trilora"])
    parser.add_argument("--tiny", action="store_true", help="tiny models of the same topology, on the CPU")
    parser.add_argument("--device", help="cuda, or cpu with --tiny")
    parser.add_argument("--warm", type=int, default=4, help="steps before the timed ones: the fourth captures a graph")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--limit", type=float, default=90, help="seconds for a case")
    parser.add_argument("--minutes", type=float, default=9.5, help="no case begins after so many")
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    if options.list:
        print(*(case.name for case in all_cases()), sep="\n")
        return
    if options.grid:
        print(grid(rows_of(options.grid)))
        return
    if options.table:
        predict = Predictions()
        print(HEAD, *(line(row, predict(row)) for row in rows_of(options.table)), sep="\n")
        return
    rows = [measure(case_of(options.case), options)] if options.case else run_all(options)
    print(HEAD)
    faults = 0
    for row in rows:
        print(line(row), flush=True)
        faults += "error" in row
        if options.json:
            with options.json.open("a") as out:
                out.write(json.dumps(row) + "\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
