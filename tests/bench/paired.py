"""Which of two settings is better? Runs both from one preset over several seeds, and compares them pair by pair.

    python -m tests.bench.paired --preset demo.toml --a adapter.init=random --b adapter.init=zero --seeds 5

Each pair has the same seed, so the same data order and noise: the differences, not the means, carry the verdict.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.events import EventReader
from trainer.run import Run

# Two-sided 95 % points of Student's t for 1 to 15 degrees of freedom.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean (Student's t)."""
    return T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, with the half of its 95 % interval where there are several."""
    half = f" ± {half_interval(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo.toml")
    parser.add_argument("--a", action="append", required=True, metavar="SECTION.KEY=VALUE")
    parser.add_argument("--b", action="append", required=True, metavar="SECTION.KEY=VALUE")
    parser.add_argument("--set", dest="both", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, len(T95) + 2))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one share a GPU")
    parser.add_argument("--workspace", type=Path, default=Path("workspace/bench"))
    options = parser.parse_args()
    print(f"a: {' '.join(options.a)}   b: {' '.join(options.b)}   both: {' '.join(options.both)}")
    print(f"{'seed':>4} {'before':>9} {'a':>9} {'b':>9} {'b - a':>9}")
    differences = []
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = [[pool.submit(train, options, name, getattr(options, name), seed) for name in "ab"]
                   for seed in range(options.seeds)]
        for seed, (first, second) in enumerate(pending):
            (before, a), (_, b) = first.result(), second.result()
            differences.append(b - a)
            print(f"{seed:>4} {before:9.5f} {a:9.5f} {b:9.5f} {b - a:+9.5f}", flush=True)
    mean, half = statistics.mean(differences), half_interval(differences)
    better = "noise" if abs(mean) < half else "a is better" if mean > 0 else "b is better"
    print(f"mean b - a = {mean:+.5f}, 95 % interval [{mean - half:+.5f}, {mean + half:+.5f}]: {better}")


def train(options: argparse.Namespace, name: str, changes: list[str], seed: int) -> tuple[float, float]:
    """One run; its validation loss before and after."""
    workspace = options.workspace / f"{name}-{seed}"  # each its own, so that they need not wait for one GPU
    run = Run(workspace / "runs" / "run")
    command = [sys.executable, "-m", "trainer", "--preset", options.preset, "--workspace", str(workspace)]
    command += ["--name", run.name]
    for change in ("sample.prompts=[]", "evaluate.distance=off", "evaluate.every=0", "log.rank_every=0",
                   *options.both, *changes, f"train.seed={seed}"):
        command += ["--set", change]
    subprocess.run(command, check=True)
    losses = [event["loss"] for event in EventReader(run.events).read() if event["kind"] == "validation"]
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
