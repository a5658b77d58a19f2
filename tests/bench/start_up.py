"""Seconds from the command to a run's first step, with warm caches: `python -m tests.bench.start_up --case sd15`.

A base of true size with random weights is made on the disk, and a data set; a first run fills all caches, and the same
command is then timed. Nothing is validated or drawn before the first step. `--tiny` rehearses on a CPU; `--imports`
also shows what takes longest to import; `--set` changes the preset.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import projects
from tests.bench import base_files
from tests.bench.true_size import SIZES
from trainer.events import Event, EventReader
from trainer.run import Run

ROOT = Path(__file__).parents[2]
PRESET = """\
[model]
{model}
[data]
folder = "{images}"
resolution = {resolution}
[adapter]
method = "stiefel"
rank = 16
[train]
steps = 1000
batch_size = {batch}
[sample]
before = false
[evaluate]
holdout = 0.0
distance = "off"
"""
LIMIT = {"sd15": 15.0, "klein-4b": 30.0}  # seconds to reach
PATIENCE = 550.0  # seconds for a run's first step


def make(case: str, folder: Path, count: int, tiny: bool) -> Path:
    """Base, images and preset below a folder; returns the preset."""
    size = SIZES[case]
    images = projects.pictures(folder / "images", count)
    text = PRESET.format(model="\n".join(base_files.MAKERS[case](folder / "base", tiny)), images=images.as_posix(),
                         resolution=64 if tiny else size.resolution, batch=1 if tiny else size.batch)
    preset = folder / "start_up.toml"
    preset.write_text(text, "utf-8")
    return preset


def to_first_step(preset: Path, workspace: Path, name: str, changes: Sequence[str],
                  options: Sequence[str] = ()) -> tuple[float, list[Event]]:
    """Start a run, wait for its first step, stop it; when it was started, and its events up to that step."""
    command = [sys.executable, *options, "-m", "trainer", "--preset", str(preset), "--workspace", str(workspace),
               "--name", name, *(word for change in changes for word in ("--set", change))]
    run = Run(workspace / "runs" / name)
    began = time.time()
    with (workspace / f"{name}.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        events = list(_until_step(run, process))
    finally:
        run.request("stop")
        process.wait(120)
    return began, events


def _until_step(run: Run, process: subprocess.Popen[bytes]) -> Iterator[Event]:
    reader, deadline = EventReader(run.events), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        for event in reader.read() if run.events.exists() else ():
            yield event
            if event["kind"] == "step":
                return
        if ended:
            break
        time.sleep(0.02)
    raise SystemExit(f"no step was made:\n{run.log_tail()}")


def parts(began: float, events: Sequence[Event]) -> list[tuple[str, float]]:
    """Where the time went: what each event ended, and how long that took."""
    spent, doing, at = [], "Python, imports", began
    for event in events:
        if spent and spent[-1][0] == doing:
            spent[-1] = doing, spent[-1][1] + event["t"] - at
        else:
            spent.append((doing, event["t"] - at))
        at = event["t"]
        doing = event.get("name", doing) if event["kind"] == "phase" else (
            "reading the step's numbers" if event["kind"] == "step" else f"after {event['kind']}")
    return [(name, seconds) for name, seconds in spent if seconds >= 0.02]


def slowest_imports(text: str, count: int = 25) -> list[str]:
    """Of what `-X importtime` wrote: the packages whose own modules take longest, without what they import."""
    totals: dict[str, int] = {}
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", text, re.MULTILINE):
        package = ".".join(name.split(".")[:2])
        totals[package] = totals.get(package, 0) + int(own)
    return [f"{micro / 1e6:6.2f} s  {name}" for name, micro in
            sorted(totals.items(), key=lambda entry: -entry[1])[:count]]


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        workspace = folder / "workspace"
        workspace.mkdir()
        preset = make(case, folder, options.images, options.tiny)
        changes = [*options.changes, *(["memory.device=cpu"] if options.tiny else [])]
        began, events = to_first_step(preset, workspace, "cold", changes)
        cold = events[-1]["t"] - began
        warm = []
        for number in range(options.times):
            began, events = to_first_step(preset, workspace, f"warm{number}", changes)
            warm.append((events[-1]["t"] - began, parts(began, events)))
        if options.imports:
            to_first_step(preset, workspace, "imports", changes, ["-X", "importtime"])
            logs = workspace / "imports.txt", workspace / "runs" / "imports" / "trainer.log"
            print(*slowest_imports("".join(log.read_text(errors="replace") for log in logs)), sep="\n")
        return {"case": case, "cold": cold, "warm": [seconds for seconds, _ in warm], "parts": min(warm)[1],
                "limit": LIMIT[case]}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(base_files.MAKERS), default=list(base_files.MAKERS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--times", type=int, default=2, help="how often the warm start is timed")
    parser.add_argument("--folder", type=Path, help="where files are made: a fast disk with 20 GB free")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="models of the same topology, 64 pixels, on the CPU")
    parser.add_argument("--json", type=Path, help="file that rows are added to, one JSON object a line")
    options = parser.parse_args()
    for case in options.case:
        row = measure(case, options)
        print(f"{case}: first step after {min(row['warm']):.1f} s (to reach: {row['limit']:.0f}); of a first run, "
              f"with cold caches, {row['cold']:.1f} s")
        print(*(f"{seconds:8.2f} s  {name}" for name, seconds in row["parts"]), sep="\n", flush=True)
        if options.json:
            with options.json.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
