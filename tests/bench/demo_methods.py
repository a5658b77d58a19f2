"""Trains the demo with every method over several seeds and prints the table of trainer/adapters/README.md.

    python -m tests.bench.demo_methods --seeds 3

Runs that are finished in the workspace already are read, not trained again, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.paired import T95, spread
from trainer.events import Event, EventReader
from trainer.run import Run

ROWS = {  # row: settings
    "lora": ["adapter.method=lora"],
    "lora + DoRA": ["adapter.method=lora", "adapter.dora=true"],
    "stiefel": ["adapter.method=stiefel"],
    "stella, random start": ["adapter.method=stella", "adapter.init=random"],
    "stella, zero start": ["adapter.method=stella", "adapter.init=zero"],
    "trilora": ["adapter.method=trilora"],
}
QUIET = ["sample.prompts=[]", "evaluate.every=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo.toml")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(T95) + 2))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--workspace", type=Path, default=Path("workspace/bench"))
    options = parser.parse_args()
    print(f"`python -m tests.bench.demo_methods {' '.join(sys.argv[1:])}`: mean over {options.seeds} seed(s) ± 95 % "
          "interval\n\n| method | effective rank, start → middle → end | validation loss, before → after | KID "
          "| s/it |\n|---|---|---|---|---|")
    for row in options.rows:
        runs = [trained(options, row, seed) for seed in range(options.seeds)]
        if row == options.rows[0]:
            kid = [event["base_kid"] for run in runs for event in run if event["kind"] == "distance"]
            base = f"| *base model* | | | {spread(kid)} | |" if kid else ""
        print(line(row, runs), flush=True)
    print(base)


def trained(options: argparse.Namespace, row: str, seed: int) -> list[Event]:
    """The events of a finished run, made if it is not there."""
    name = "".join(letter if letter.isalnum() else "-" for letter in row)
    run = Run(options.workspace / "runs" / f"demo-{name}-{seed}")
    if not run.result.exists():
        command = [sys.executable, "-m", "trainer", "--preset", options.preset, "--workspace", str(options.workspace),
                   "--name", run.name]
        for change in (*QUIET, *ROWS[row], *options.settings, f"train.seed={seed}"):
            command += ["--set", change]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return EventReader(run.events).read()


def line(row: str, runs: Sequence[Sequence[Event]]) -> str:
    """One row of the table."""
    ranks = [[statistics.mean(event["erank"].values()) for event in run if event["kind"] == "rank"] for run in runs]
    path = " → ".join(f"{statistics.mean(values):.2f}" for values in
                      zip(*((each[0], each[len(each) // 2], each[-1]) for each in ranks)))
    losses = [[event["loss"] for event in run if event["kind"] == "validation"] for run in runs]
    before, after = ([each[end] for each in losses] for end in (0, -1))
    kid = [event["kid"] for run in runs for event in run if event["kind"] == "distance"]
    pace = statistics.mean(event["sec"] for run in runs for event in run if event["kind"] == "step")
    return (f"| {row} | {path} | {statistics.mean(before):.4f} → {spread(after)} | {spread(kid) if kid else ''} "
            f"| {pace:.2f} |")


if __name__ == "__main__":
    main()
