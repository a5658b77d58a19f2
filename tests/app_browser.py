"""What the browser tests share: the app as a process, and a page of Chromium."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from trainer import run
from trainer.events import EventWriter

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PRESET = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = {steps}\n'

expect.set_options(timeout=40_000)  # others use the machine: several browsers at a time


@pytest.fixture(scope="module", name="browser")
def chromium():
    assert Path(CHROMIUM).exists(), f"these tests need {CHROMIUM}: sudo apt install chromium"
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield instance
        instance.close()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


# Keeps the next answer to `name` back; what is asked after it may be answered before it
HOLD = """name => {
    const { ask } = Studio;
    delete window.arrive;
    Studio.ask = async (server, asked, request) => {
        if (asked !== name) return ask(server, asked, request);
        Studio.ask = ask;
        const answer = await ask(server, asked, request);
        await new Promise((go) => { window.arrive = go; });
        return answer;
    };
}"""


@contextmanager
def late(page, name, asking=None):
    """An answer to the function `name`, asked by `asking` or by the page itself, is on its way until this ends."""
    page.evaluate(HOLD, name)
    if asking:
        asking()
    page.wait_for_function("window.arrive !== undefined")
    yield
    page.evaluate("() => { window.arrive(); return new Promise((done) => { setTimeout(done); }); }")


def curve(page, title):
    """A chart that has something to show."""
    return page.get_by_role("img", name=f"{title}, steps")


def run_in(workspace, name, steps=100_000, rows=0):
    """A run that was killed after `rows` steps and a checkpoint."""
    ours = run.create(workspace, name, PRESET.format(steps=steps))
    events = EventWriter(ours.events)
    events.write("start", v=1, step=0, steps=steps, device="cpu", host="box", torch="2")
    for step in range(1, rows + 1):
        events.write("step", step=step, steps=steps, loss=1 / step, lr=1e-4, sec=1.0, eta=1.0)
    if rows:
        ours.checkpoint(rows).mkdir(parents=True)
    return ours


class Server:
    """The app with a stand-in for the trainer; it can be killed and started again on the same port."""

    def __init__(self, workspace: Path, pace: float = 0.02, password: str | None = None) -> None:
        self.workspace, self.pace, self.password = workspace, pace, password
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        command = [sys.executable, str(Path(__file__).parent / "app_server.py"), str(self.port), str(self.workspace),
                   str(self.pace), *([self.password] if self.password else [])]
        self.workspace.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(command)
        end = time.monotonic() + 180
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return self
            except urllib.error.HTTPError:
                return self  # it asks for a password
            except OSError:
                assert self.process.poll() is None, "the app ended"
                time.sleep(0.1)
        raise AssertionError("the app did not answer")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextmanager
def served(workspace: Path, pace: float = 0.02, password: str | None = None):
    """A running app, with the trainers that it started stopped afterwards."""
    server = Server(workspace, pace, password).start()
    try:
        yield server
    finally:
        server.kill()
        for control in workspace.glob("runs/*/control"):
            (control / "stop").touch()


@contextmanager
def opened(browser, address: str, width: int = 1440, theme: str = "light", motion: str = "no-preference"):
    """A page; errors of its scripts fail the test."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion=motion,
                                  accept_downloads=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    try:
        yield page
        assert errors == []
    finally:
        context.close()


def faults(page) -> list[str]:
    """What axe finds against WCAG 2 A and AA."""
    package = find_spec("axe_playwright_python")
    assert package and package.origin, "pip install -r tests/requirements.txt"
    [axe] = Path(package.origin).parent.rglob("axe.min.js")
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
    return [f"{fault['id']}: {node['html'][:160]} | {node['failureSummary'][:240]}"
            for fault in found["violations"] for node in fault["nodes"][:3]]
