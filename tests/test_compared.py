"""A comparison of three methods on the demo, from one command to its report, as a person makes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_report import whole
from trainer.events import EventReader
from trainer.queue import Queue
from trainer.run import Run

ROOT = Path(__file__).parent.parent
SMALL = ("data.resolution=64", "train.steps=6", "train.batch_size=2", "train.warmup_steps=0", "sample.every=0",
         "sample.before=false", "sample.steps=2", 'sample.prompts=["openmoji style, rocket, space"]',
         "evaluate.every=3", "evaluate.images=2", "evaluate.generate=4", "evaluate.quantiles=2", "log.rank_every=3",
         "output.save_every=0")
METHODS = ("lora", "stiefel", "stella")

pytestmark = pytest.mark.slow


def trainer(*words: str, workspace: Path) -> str:
    done = subprocess.run([sys.executable, "-m", "trainer", *words, "--workspace", str(workspace)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_three_methods_on_the_demo_from_one_command_to_the_report(tmp_path: Path) -> None:
    begun = time.monotonic()
    overrides = [word for setting in SMALL for word in ("--set", setting)]
    said = trainer("sweep", "--preset", "demo", "--methods", ",".join(METHODS), "--name", "demo", *overrides,
                   workspace=tmp_path)
    assert "demo: 3 runs: 3 methods, put into the queue" in said and "compare demo" in said
    names = [f"demo-{method}-r8-s0" for method in METHODS]
    queue = Queue(tmp_path)
    while queue.names() and time.monotonic() - begun < 400:
        time.sleep(0.5)
    runs = [Run(tmp_path / "runs" / name) for name in names]
    assert not queue.failures() and [run.state().word for run in runs] == ["done"] * 3, queue.failures()
    print(f"\nthree runs: {time.monotonic() - begun:.0f} s")

    data = {json.dumps([event[key] for key in ("images", "held_out", "sha256")]) for run in runs
            for event in EventReader(run.events).read() if event["kind"] == "data"}
    assert len(data) == 1 and '[24, 48, "' in data.pop()  # all of them saw the same
    told = json.loads(trainer("compare", "demo", "--json", workspace=tmp_path))
    assert [one["overview"]["name"] for one in told["runs"]] == names
    assert {one["distance"]["n_gen"] for one in told["runs"]} == {4} and len(told["findings"]) == 4
    trainer("compare", "demo", "--html", str(tmp_path / "report.html"), workspace=tmp_path)
    html = (tmp_path / "report.html").read_text("utf-8")
    text = " ".join(whole(html).text)
    assert "3 runs of 3 settings" in text and html.count("<img") == 3 and str(tmp_path) not in html
    assert all(part in text for part in (*METHODS, "Validation loss", "KID ×10³ against time", "Samples at step 6"))
    trainer("show", names[0], "--html", str(tmp_path / "card.html"), workspace=tmp_path)
    assert "worst relative error" in " ".join(whole((tmp_path / "card.html").read_text("utf-8")).text)
