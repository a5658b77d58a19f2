"""Steps of the demo on the CPU with threads that spin while they wait, and with threads that sleep: alone on the
machine, and beside other programs that keep cores busy. trainer/cores.py chooses between the two by it.

    python -m tests.bench.waiting --rounds 2 --busy 0 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.cores import WAIT
from trainer.events import EventReader
from trainer.run import Run

ROOT = Path(__file__).parents[2]
POLICIES = ("ACTIVE", "PASSIVE")
QUIET = ["sample.prompts=[]", "evaluate.every=0", "evaluate.distance=off"]
WARMUP = 5  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="other programs, each as busy as can be")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    print(f"`python -m tests.bench.waiting {' '.join(sys.argv[1:])}`: median seconds a step")
    for count in options.busy:
        with busy(count):
            times = {policy: [] for policy in POLICIES}
            for _ in range(options.rounds):
                for policy in POLICIES:
                    times[policy] += steps(policy, options.steps)
        spin, sleep = (statistics.median(times[policy]) for policy in POLICIES)
        print(f"beside {count}: spin {spin:.3f}, sleep {sleep:.3f}, sleep / spin {sleep / spin:.2f}", flush=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Other programs that never rest."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def steps(policy: str, count: int) -> list[float]:
    """Seconds of the demo's steps, by a process of its own that uses all cores."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {WAIT: policy}
    with tempfile.TemporaryDirectory() as workspace:
        settings = [word for change in [*QUIET, f"train.steps={count}"] for word in ("--set", change)]
        subprocess.run([sys.executable, "-m", "trainer", "--preset", "demo.toml", "--workspace", workspace, "--name",
                        "a", *settings], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
        events = EventReader(Run(Path(workspace) / "runs/a").events).read()
    return [event["sec"] for event in events if event["kind"] == "step"][WARMUP:]


if __name__ == "__main__":
    main()
