"""What the live view of a long run costs the network and the browser: python -m tests.bench.live_view

    python -m tests.bench.live_view --points 20000 --seconds 30

Makes a run of so many steps with all that is measured, lets a stand-in write a step a second on, and reads from
Chromium: bytes a second, milliseconds of the main thread a second, JavaScript heap, layout shifts.  Twice: with a page
that was opened at the end (the server thins its first answer), and with one that has lived through the run, whose
steps came a few hundred at a time.  Last, how long the list of fifty runs takes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import CDPSession, Page, sync_playwright

from app.jobs import Jobs
from app.paths import Places
from app.tabs import train
from app.tabs.train_requests import ListRuns
from tests.app_browser import CHROMIUM, FLAGS, served
from tests.measured_run import measure, measured, one_step, save
from trainer.events import EventWriter
from trainer.run import Run

SHIFTS = """() => { window.shifted = 0; new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shifted += entry.value; }).observe({ type: 'layout-shift' }); }"""
BURST = 250  # steps at once, for a page that lives through the run


class Writer:
    """Goes on with a run as its trainer would: it holds the lock and writes a step a second."""

    def __init__(self, run: Run, folder: Path, first: int, planned: int) -> None:
        self.run, self.folder, self.step, self.planned = run, folder, first, planned
        self.events = EventWriter(run.events)
        self._stop = threading.Event()

    def write(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            one_step(self.events, self.step, self.planned)
            if self.step % 25 == 0:
                measure(self.events, self.folder, self.step, self.planned)

    def live(self) -> None:
        with self.run.hold():
            self.events.write("start", v=2, step=self.step, steps=self.planned, device="cuda", host="box", torch="2")
            while not self._stop.wait(1.0):
                self.write(1)

    def __enter__(self) -> Writer:
        self._thread = threading.Thread(target=self.live)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def make(workspace: Path, name: str, points: int) -> tuple[Run, Path]:
    """A run of `points` steps, all measured, with ten saves."""
    run = measured(workspace, name, steps=0, planned=points * 2)
    folder = workspace / "datasets" / "cats"
    writer = Writer(run, folder, 0, points * 2)
    for _ in range(10):
        writer.write(points // 10)
        save(run, writer.events, writer.step, points)
    writer.events.close()
    return run, folder


def busy(session: CDPSession) -> tuple[float, float]:
    """Seconds of the main thread so far, and bytes of JavaScript's heap."""
    facts = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
    return facts["TaskDuration"], facts["JSHeapUsedSize"]


def watch(page: Page, seconds: int) -> tuple[float, float, float, float]:
    """Bytes a second, milliseconds of the main thread a second, megabytes of heap, layout shift."""
    session = page.context.new_cdp_session(page)
    received: list[float] = []
    session.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
    session.send("Network.enable")
    session.send("Performance.enable")
    page.evaluate(SHIFTS)
    before, _ = busy(session)
    begun = time.monotonic()
    page.wait_for_timeout(1000 * seconds)
    after, heap = busy(session)
    took = time.monotonic() - begun
    return sum(received) / took, 1000 * (after - before) / took, heap / 1e6, page.evaluate("window.shifted")


def say(what: str, found: tuple[float, float, float, float]) -> None:
    size, work, heap, shift = found
    print(f"{what:42} {size:6.0f} bytes/s (at most 1000)   {work:5.0f} ms/s (at most 160)   heap {heap:5.1f} MB   "
          f"layout shift {shift:.3f}")


def measure_views(workspace: Path, points: int, seconds: int) -> None:
    with served(workspace) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        run, folder = make(workspace, "long", points)
        with Writer(run, folder, points, points * 2):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"{server.address}?run=long")
            page.wait_for_selector(".st-hard tbody tr")
            page.wait_for_timeout(15_000)  # small pictures are made and fetched
            say(f"opened at step {points}", watch(page, seconds))
            page.close()
        run, folder = make(workspace, "lived", 1000)
        writer = Writer(run, folder, 1000, points * 2)
        with writer:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"{server.address}?run=lived")
            page.wait_for_selector(".st-hard tbody tr")
            while writer.step < points:
                writer.write(BURST)
                page.wait_for_timeout(1200)
            page.wait_for_timeout(15_000)  # small pictures are made and fetched
            say(f"lived through {points} steps", watch(page, seconds))
        browser.close()


def measure_list(workspace: Path) -> None:
    for number in range(48):
        measured(workspace, f"run {number}", steps=25)
    times = []
    for _ in range(5):
        jobs = Jobs(Places(workspace))  # a fresh one: nothing is kept from the time before
        begun = time.perf_counter()
        train.list_runs(jobs, ListRuns())
        times.append(1000 * (time.perf_counter() - begun))
    print(f"list of {len(jobs.listing())} runs, first time: {median(times):.0f} ms (at most 200)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--seconds", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_views(Path(folder) / "w", options.points, options.seconds)
        measure_list(Path(folder) / "w")


if __name__ == "__main__":
    main()
