"""Times an optimizer step of every method beside the published way: `python -m tests.bench.methods [--device cuda]`.

With --profile, where a step's time goes instead: by phase, launches and kernels (or operators, on a CPU).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tests.bench import published
from trainer.adapters import Target, build, effective_rank
from trainer.adapters.bank import MEASURE_EVERY
from trainer.manifold import orthogonality_error
from trainer.optim import build_optimizer, clip_grad_norm
from trainer.update import Update

LR = 5e-4
OURS = {  # row: (method, optimizer, retraction)
    "LoRA, AdamW": ("lora", "adamw", "default"),
    "StelLA": ("stella", "adamw", "polar"),
    "StelLA, exponential map": ("stella", "adamw", "exponential"),
    "Stiefel-LoRA": ("stiefel", "stiefel", "default"),
    "Stiefel-LoRA, AdamW": ("stiefel", "adamw", "default"),
}
PUBLISHED = {"StelLA": "StelLA, published way", "Stiefel-LoRA": "Stiefel-LoRA, published way"}


def sd15_attention() -> list[tuple[int, int]]:
    """(m, n) of the 128 linears: attn1 q, k, v, out; attn2 q, out, and k, v from 768."""
    blocks = [320] * 5 + [640] * 5 + [1280] * 6
    return [size for d in blocks for size in [(d, d)] * 6 + [(d, 768)] * 2]


def flux_attention() -> list[tuple[int, int]]:
    """The 190 image-stream q, k, v and out linears of Flux.1."""
    return [(3072, 3072)] * (19 * 4 + 38 * 3)


def flux_all() -> list[tuple[int, int]]:
    """All 418 linears of the blocks of Flux.1."""
    double = [(3072, 3072)] * 8 + [(12288, 3072), (3072, 12288)] * 2
    single = [(3072, 3072)] * 3 + [(12288, 3072), (3072, 15360)]
    return double * 19 + single * 38


def sdxl_attention() -> list[tuple[int, int]]:
    """The 560 attention linears: 10 blocks of 640 and 60 of 1280, with k and v from 2048."""
    return [size for d in [640] * 10 + [1280] * 60 for size in [(d, d)] * 6 + [(d, 2048)] * 2]


def klein_4b_all() -> list[tuple[int, int]]:
    """All 100 linears of the blocks of Flux.2 klein 4B."""
    double = [(3072, 3072)] * 8 + [(18432, 3072), (3072, 9216)] * 2
    return double * 5 + [(27648, 3072), (3072, 12288)] * 20


SETS = {"SD1.5 attention": sd15_attention, "SDXL attention": sdxl_attention, "klein 4B all": klein_4b_all,
        "Flux attention": flux_attention, "Flux all": flux_all}


def make(sizes: list[tuple[int, int]], rank: int, row: str, device: torch.device) -> Update:
    """The whole optimizer step of a row's method over adapters of these sizes."""
    method, optimizer, retraction = OURS[row]
    targets = [Target(f"layer{i}", nn.Linear(n, m, bias=False, device="meta"), "all") for i, (m, n) in enumerate(sizes)]
    adapter = build(targets, method=method, rank=rank, retraction=retraction, device=device)
    return Update(adapter, build_optimizer(optimizer, adapter, lr=LR), 1.0)


def measure_ours(update: Update, device: torch.device, steps: int, checked_steps: int) -> tuple[float, float, float]:
    """Milliseconds a step, max |X^T X - I| after `checked_steps` with random gradients, and the milliseconds for which
    the loop waits when effective rank is taken (its default: once in 25 steps)."""
    adapter, loss = update.adapter, torch.zeros((), device=device)
    for _ in range(checked_steps):
        for leaf in adapter.parameters():
            leaf.grad.normal_()
        update(loss)
    errors = [orthogonality_error(leaf.detach()).item() for leaf in adapter.on_manifold().values()]
    spectrum = timed(lambda: effective_rank.take(adapter), device, 5)
    return timed(lambda: update(loss), device, steps), max(errors, default=float("nan")), spectrum


def profiled(update: Update, device: torch.device, steps: int = MEASURE_EVERY) -> Iterable[str]:
    """Microseconds a step and launches by phase, then the ten longest kernels; eager, so that phases have names.

    As many steps as lie between two that correct what rounding did: one of them does.
    """
    adapter, on_gpu = update.adapter, device.type == "cuda"
    phases = {"begin": adapter.begin_step,
              "clip": lambda: update.norm.copy_(clip_grad_norm(adapter.parameters(), update.max_norm)),
              "guard": lambda: adapter.guard(update.loss, update.norm), "before": adapter.before_step,
              "optimizer": update.optimizer.step, "after": adapter.after_step, "average": adapter.ema_update,
              "zero": adapter.zero_grad}

    def step() -> None:
        for leaf in adapter.parameters():
            leaf.grad.normal_()
        for name, phase in phases.items():
            with record_function(f"phase {name}"):
                phase()

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            step()
    events, host = trace.key_averages(), torch.autograd.DeviceType.CPU
    for event in events:
        if event.key.startswith("phase ") and event.device_type == host:
            micros = (event.device_time_total if on_gpu else event.cpu_time_total) / steps
            yield f"    {event.key.removeprefix('phase '):10} {micros:9.0f} us"
    kernels = [event for event in events if (event.device_type != host) == on_gpu
               and not event.key.startswith(("phase ", "Optimizer."))]
    spent = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in kernels}
    count = sum(event.count for event in kernels) // steps
    yield f"    {count} {'launches' if on_gpu else 'operators'} a step, the longest:"
    for event in sorted(kernels, key=lambda event: -spent[event.key])[:10]:
        yield f"    {spent[event.key] / steps:9.0f} us  {event.count // steps:4} x  {event.key[:100]}"


def measure_published(sizes: list[tuple[int, int]], rank: int, row: str, device: torch.device, steps: int) -> float:
    """Milliseconds a step."""
    ups = published.parameters_of([(m, rank) for m, _ in sizes], device)
    downs = published.parameters_of([(n, rank) for _, n in sizes], device)
    if row == "StelLA":
        cores = published.parameters_of([(rank, rank)] * len(sizes), device)
        return timed(published.stella_step(ups + downs, cores, LR), device, steps)
    return timed(published.stiefel_step(ups, downs, LR), device, steps)


def timed(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Median milliseconds over steps, after warming up (and, for ours on a GPU, capturing the graph).

    A whole step of ours corrects in one of eight what rounding did: those steps are longer than this says.
    """
    for _ in range(min(6, steps + 1)):
        step()
    samples = []
    for _ in range(steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - started) * 1e3)
    return sorted(samples)[len(samples) // 2]


def rows(sizes: list[tuple[int, int]], rank: int, device: torch.device, options: argparse.Namespace) -> Iterable[str]:
    plain = None
    for row in OURS:
        update = make(sizes, rank, row, device)
        if options.profile:
            yield f"{row}, rank {rank}"
            yield from profiled(update, device)
            continue
        ours, error, spectrum = measure_ours(update, device, options.steps, options.checked)
        plain = ours if plain is None else plain
        orthogonality = "" if error != error else f"{error:.1e}"
        yield f"| {rank} | {row} | {ours:.2f} | {ours - plain:+.2f} | | {orthogonality} | {spectrum:.2f} |"
        del update
        if row in PUBLISHED and not options.ours:
            theirs = measure_published(sizes, rank, row, device, max(1, options.steps // 10))
            yield f"| {rank} | {PUBLISHED[row]} | {theirs:.2f} | {theirs - plain:+.2f} | {theirs / ours:.1f} | | |"
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64, 128])
    parser.add_argument("--steps", type=int, default=50, help="timed steps a row (a tenth of it for the published way)")
    parser.add_argument("--checked", type=int, default=1000, help="steps before orthogonality is measured")
    parser.add_argument("--ours", action="store_true", help="leave out the published way")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, by phase and kernel")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {name}; {options.checked} steps, then the median of {options.steps} timed ones")
    for title in options.sets:
        sizes = SETS[title]()
        print(f"\n### {title}: {len(sizes)} layers\n")
        if not options.profile:
            print("| rank | method | ms a step | over LoRA | times ours | max abs XᵀX−I | effective rank, ms a call |\n"
                  "|---|---|---|---|---|---|---|")
        for rank in options.ranks:
            for line in rows(sizes, rank, device, options):
                print(line, flush=True)


if __name__ == "__main__":
    main()
