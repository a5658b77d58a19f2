"""Step times of true-size models, ours beside the peer's: `python -m tests.bench.step_time --case sd15:4 --json FILE`.

A case is model:batch, with :selective or :full for checkpointing and then :fp8 or :nf4 for our weights. The peer's
weights have 16 bits; beside our selective checkpointing it has its own, which is full.
Its rows run one after the other, each in a process of its own: the peer (see peer.py) and the trainer's whole step
(gradients, clipping, optimizer with retraction, average), by method. `+` adds to a row: peer+compile and
lora+compile, lora+eager and lora+graph (without CUDA graphs, and with them), lora+nchw (convolutions in torch's own
order), lora+attention (its kernels chosen as in a long run), lora+fp8 and lora+int8 (frozen layers multiply so, as far
as they are large).
`--agree` compares both sides' losses over 20 steps from the same start instead, for the rows of plain LoRA.
`--table FILE…` shows rows of earlier runs, each ratio by the peer's row of the same run. `--tiny`
rehearses on a CPU, `--profile` prints what the GPU's time goes to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import memory, peer, true_size
from tests.bench.apart import run_apart
from tests.bench.memory import RANK, Step, wait
from tests.bench.true_size import SIZES, Size
from trainer import families
from trainer.fast import attention, convolutions, start
from trainer.memory.plan import LEVELS, Plan
from trainer.schema import FLOW_FAMILIES
from trainer.session import Session, hold
from trainer.update import Update

ROWS = ("peer", "lora", "stiefel", "stella")
FLAGS = {"compile": ("train.compile=on",), "eager": ("memory.cuda_graphs=off",), "graph": ("memory.cuda_graphs=on",),
         "nchw": (), "fp8": ("train.matmul=fp8",), "int8": ("train.matmul=int8",), "attention": ()}
WARM = 6  # steps: the third pass and the fourth update are recorded
AGREE_STEPS, AGREE = 20, 0.02
PASSES = 2.0  # work of a step over that of a forward pass: the gradient of each input, and none of frozen weights


@dataclass(frozen=True)
class Row:
    """One measurement: a model with its work, and who does it."""

    size: str
    batch: int
    checkpointing: str
    quantize: str
    who: str

    @property
    def case(self) -> str:
        extra = [self.checkpointing, self.quantize] if self.quantize != "none" else (
            [self.checkpointing] if self.checkpointing != "none" else [])
        return ":".join([self.size, str(self.batch), *extra])

    @property
    def name(self) -> str:
        return f"{self.case} {self.who}"

    def flags(self) -> list[str]:
        return self.who.split("+")[1:]


def rows_of(case: str, names: Sequence[str]) -> list[Row]:
    """The rows of a case such as klein-4b:1:full:nf4, or klein-4b:1=peer,stella with rows of its own."""
    case, _, own = case.partition("=")
    names = own.split(",") if own else names
    size, batch, checkpointing, quantize = [*case.split(":"), "none", "none"][:4] if ":" in case else [case, *"   "]
    known = all(name.split("+")[0] in ROWS and set(name.split("+")[1:]) <= set(FLAGS) for name in names)
    if (size not in SIZES or not batch.isdigit() or checkpointing not in LEVELS or not known
            or quantize not in memory.QUANTIZE):
        raise SystemExit(f"there is no case {case} with rows {', '.join(names)}")
    return [Row(size, int(batch), peer_level(checkpointing), "none", name) if name.startswith("peer")
            else Row(size, int(batch), checkpointing, quantize, name) for name in names]


def peer_level(checkpointing: str) -> str:
    """The peer's checkpointing beside ours: it knows none and full."""
    return "none" if checkpointing == "none" else "full"


# One row.


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Build the model, take the steps, and say how long they took."""
    began = time.perf_counter()
    device, dtype, size = place(options, row)
    found = {"name": row.name, "case": row.case, **asdict(row), "device": memory.device_name(device),
             "torch": version("torch"), "diffusers": version("diffusers"), "resolution": size.resolution}
    torch.manual_seed(0)
    if row.who.startswith("peer"):
        step, facts = peer_step(row, size, device, dtype)
        found |= {"ceiling": matmul_ceiling(device), "peft": version("peft")}
    else:
        step, facts = our_step(row, size, device, dtype)
    wait(device)
    built = time.perf_counter() - began
    losses = [step(0)]
    wait(device)
    found["first_sec"] = time.perf_counter() - began
    losses += [step(number) for number in range(1, options.warm)]
    wait(device)
    found["warm_sec"] = time.perf_counter() - began
    seconds = timed(step, device, options.warm, options.steps)
    if options.profile:
        profile(step, device)
    return found | facts | {"built_sec": built, "sec": statistics.median(seconds), "secs": seconds,
                            "peak": memory.peak(device), "reserved": memory.reserved(device),
                            "losses": torch.stack(losses).float().tolist()}


def place(options: argparse.Namespace, row: Row) -> tuple[torch.device, torch.dtype, Size]:
    """Where to compute, how, and what."""
    size = replace(SIZES[row.size], batch=row.batch)
    if options.device == "cpu":
        return torch.device("cpu"), torch.float32, replace(true_size.shrunk(size), batch=row.batch)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device, torch.bfloat16, size


def peer_step(row: Row, size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Step, dict[str, Any]]:
    """The peer's step, compiled or not, and the work in it."""
    denoiser = true_size.denoiser_of(size, "none", device, dtype)
    built = peer.build(size, denoiser, RANK, row.checkpointing == "full", device, dtype,
                       *true_size.batch_of(size, dtype))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        built.predict()
    if "compile" in row.flags():
        denoiser.compile()
    return built.step, {"trained": built.trained, "flop": PASSES * counted.get_total_flops()}


def our_step(row: Row, size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Step, dict[str, Any]]:
    """The trainer's own step, with everything that it does by itself to be fast."""
    method, *flags = row.who.split("+")
    denoiser = true_size.denoiser_of(size, row.quantize, device, dtype)
    changes = ["train.ema_decay=0.99", *(change for flag in flags for change in FLAGS[flag])]
    session = session_of(size, method, changes, denoiser, device, dtype, row)
    if "nchw" in flags:
        convolutions.lay_out(denoiser, torch.contiguous_format)
    if "attention" in flags:
        session.steps, session.cache = attention.WORTH_STEPS, SimpleNamespace(root=Path(tempfile.mkdtemp()) / "cache")
    notes: list[str] = []
    step = trainer_step(session, size, notes)
    return step, {"trained": sum(leaf.numel() for leaf in session.adapter.parameters()), "notes": notes}


def session_of(size: Size, method: str, changes: Sequence[str], denoiser: torch.nn.Module, device: torch.device,
               dtype: torch.dtype, row: Row) -> Session:
    """A session that holds its model as the row says."""
    chosen = true_size.preset_of(size, method, RANK, changes)
    session = true_size.session_of(size, chosen, denoiser, device, dtype)
    session.plan = Plan(row.quantize, row.checkpointing)
    session.offload = hold(session.family, denoiser, session.plan, device)
    return session


def trainer_step(session: Session, size: Size, notes: list[str]) -> Step:
    """A step of the training loop; what the trainer would tell is added to `notes`."""
    session.recorder = SimpleNamespace(note=lambda step, text: notes.append(text), phase=lambda text: None)
    session.order = SimpleNamespace(batch=lambda step: true_size.draws(size, step))
    start.prepare(session)
    update = Update(session.adapter, session.optimizer, session.preset.train.max_grad_norm)

    def step(number: int) -> Tensor:
        loss = session.gradients(true_size.draws(size, number), coming=true_size.draws(size, number + 1))
        update(loss)
        session.progress.step += 1
        return loss

    return step


def timed(step: Step, device: torch.device, first: int, count: int) -> list[float]:
    """Seconds of each step, the host free to run ahead of the device as it does in a run."""
    if device.type != "cuda":
        return memory.run_steps(lambda number: step(first + number), device, 0, count)[1]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for number, mark in enumerate(marks[1:]):
        step(first + number)
        mark.record()
    wait(device)
    return [one.elapsed_time(other) / 1000 for one, other in zip(marks, marks[1:])]


def matmul_ceiling(device: torch.device) -> float:
    """FLOP a second that a large bf16 product reaches."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    one = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / statistics.median(timed(lambda number: (one @ one)[0, 0], device, 0, 20))


def profile(step: Step, device: torch.device) -> None:
    """Print what a step's time goes to, by kernel."""
    gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU  # one: quick to sum up
    with torch.profiler.profile(activities=[kind]) as recorded:
        step(0)
        wait(device)
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70), flush=True)


# Agreement.


def agree(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Losses of the peer and of ours over 20 steps: same weights, start, noise and order; one after the other."""
    device, dtype, size = place(options, row)
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, "none", device, dtype)
    latents, texts = true_size.batch_of(size, dtype)
    built = peer.build(size, denoiser, RANK, row.checkpointing == "full", device, dtype, latents, texts)
    pairs = peer_pairs(denoiser, families.get(size.family).DENOISER)
    theirs = [built.step(number).item() for number in range(AGREE_STEPS)]
    del built
    denoiser.unload_lora()
    changes = ["adapter.fuse_qkv=false"] if size.family in FLOW_FAMILIES else []
    changes += [change for flag in row.flags() for change in FLAGS[flag]]
    session = session_of(size, "lora", changes, denoiser.eval(), device, dtype, row)
    session.latents.kept, session.texts.kept = latents, texts
    session.adapter.load_pairs(pairs)
    notes: list[str] = []
    step = trainer_step(session, size, notes)
    ours = [step(number).item() for number in range(AGREE_STEPS)]
    start.finish(session)
    worst = max(abs(one / other - 1) for one, other in zip(ours, theirs))
    return {"name": row.name, "case": row.case, **asdict(row), "device": memory.device_name(device), "agree": worst,
            "ours": ours, "theirs": theirs, "notes": notes}


def peer_pairs(denoiser: torch.nn.Module, prefix: str) -> dict[str, tuple[Tensor, Tensor, None]]:
    """The peer's start as pairs (up, down) by our names of layers."""
    return {f"{prefix}.{path}": (module.lora_B["default"].weight.detach().clone(),
                                 module.lora_A["default"].weight.detach().clone(), None)
            for path, module in denoiser.named_modules() if hasattr(module, "lora_A")}


# Showing.

HEAD = ("| case | who | ms a step | spread | peak GiB | of the ceiling | to the first step | × the peer |\n"
        "|---|---|---|---|---|---|---|---|")


def line(row: dict[str, Any], before: Sequence[dict[str, Any]]) -> str:
    """A row of the table; ratio and share of the ceiling are of the peer's eager row of the same case, the nearest of
    the same run `before` it."""
    if "error" in row:
        return f"| {row['name']} | {row['error']} |"
    if "agree" in row:
        return f"| {row['case']} | losses of {row['who']} and peer | differ by {row['agree']:.2%} at most |"
    base = next((other for other in (row, *reversed(before)) if other.get("who") == "peer" and "sec" in other
                 and (other.get("run"), other["size"], other["batch"], other["checkpointing"]) == (
                     row.get("run"), row["size"], row["batch"], peer_level(row["checkpointing"]))), None)
    seconds = sorted(row["secs"])
    spread = f"{1000 * seconds[len(seconds) // 10]:.1f}–{1000 * seconds[-1 - len(seconds) // 10]:.1f}"
    share = f"{base['flop'] / row['sec'] / base['ceiling']:.0%}" if base else ""
    ratio = f"{base['sec'] / row['sec']:.2f}" if base else ""
    return (f"| {row['case']} | {row['who']} | {1000 * row['sec']:.1f} | {spread} | {row['peak'] / memory.GIB:.1f} "
            f"({row['reserved'] / memory.GIB:.1f} reserved) | {share} | {row['first_sec']:.1f} s | {ratio} |")


def table(files: Sequence[Path]) -> Iterator[str]:
    """The rows of earlier runs, each file by itself: whatever two files tell of was not one run."""
    for file in files:
        rows = [json.loads(text) for text in file.read_text().splitlines()]
        yield from (line(row, rows[:number]) for number, row in enumerate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--case", nargs="+", help="model:batch[:checkpointing[:quantize]][=ROW,ROW…]")
    chosen.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="rows of earlier runs as a table")
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(ROWS)} (all of them; with --agree lora), with "
                                                  f"+{' +'.join(FLAGS)}")
    parser.add_argument("--agree", action="store_true", help="compare losses with the peer's instead of times")
    parser.add_argument("--profile", action="store_true", help="print what each row's time goes to")
    parser.add_argument("--json", type=Path, help="file that rows are added to, one JSON object a line")
    parser.add_argument("--tiny", dest="device", action="store_const", const="cpu", default="cuda",
                        help="tiny models of the same topology, on the CPU")
    parser.add_argument("--warm", type=int, default=WARM, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a row")
    options = parser.parse_args()
    if options.table:
        print(HEAD, *table(options.table), sep="\n")
        return
    usual = options.rows or (["lora"] if options.agree else ROWS)
    todo, rows = [row for case in options.case for row in rows_of(case, usual)], []
    if options.agree and (others := [row.who for row in todo if not row.who.startswith("lora")]):
        parser.error(f"--agree compares plain LoRA with the peer, in rows such as lora+compile: leave out {others[0]}")
    print(HEAD, flush=True)
    began = datetime.now().isoformat(timespec="seconds")  # told in each row: a file may hold several runs
    for found in run_apart(todo, options, agree if options.agree else measure):
        rows.append(found := found | {"run": began})
        print(line(found, rows[:-1]), *found.get("notes", ()), sep="\n  ", flush=True)
        if options.json:
            with options.json.open("a") as out:
                out.write(json.dumps(found) + "\n")
    sys.exit(any("error" in row or row.get("agree", 0) > AGREE for row in rows))


if __name__ == "__main__":
    main()
