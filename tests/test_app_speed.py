"""What starting the app and listing its runs costs, beside what cannot be helped on the same machine."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from app.jobs import Jobs
from app.paths import Places
from app.tabs import train
from app.tabs.train_requests import ListRuns
from tests.run_folders import finished

pytestmark = pytest.mark.timed
ROOT = Path(__file__).parent.parent
BEYOND_GRADIO = 2.0  # seconds
LISTING = 0.2  # seconds for fifty runs
TIMES = 2  # the quicker one counts: others may be using the machine


def import_gradio():
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import gradio"], check=True)
    return time.perf_counter() - begun


def serve(workspace):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "app", "--port", str(port), "--workspace", str(workspace)],
                               cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                return time.perf_counter() - begun
            except OSError:
                assert process.poll() is None and time.perf_counter() - begun < 120
                time.sleep(0.02)
    finally:
        process.terminate()
        process.wait()


def test_the_app_is_up_two_seconds_after_what_gradio_alone_takes(tmp_path):
    pairs = [(import_gradio(), serve(tmp_path)) for _ in range(TIMES)]
    gradio, ours = (min(times) for times in zip(*pairs))
    assert ours <= gradio + BEYOND_GRADIO, pairs


def test_fifty_runs_are_listed_in_a_fifth_of_a_second(tmp_path):
    """By an app that sees them for the first time, and by one that knows them."""
    for number in range(50):
        finished(tmp_path, f"run-{number}", steps=200)
    cold, warm = [], []
    for _ in range(3):
        jobs = Jobs(Places(tmp_path))
        for times in (cold, warm):
            begun = time.perf_counter()
            assert len(train.list_runs(jobs, ListRuns())["rows"]) == 50
            times.append(time.perf_counter() - begun)
            jobs._listing = (0.0, [])  # which all tabs share for half a second
    assert min(cold) <= LISTING and min(warm) <= LISTING, (cold, warm)
