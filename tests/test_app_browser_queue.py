"""The queue in a real browser: a second start waits, is moved, cancelled and had back, and outlives the app."""

import os
import signal
import time

import pytest
from playwright.sync_api import expect

from tests.app_browser import PRESET, button, chromium, faults, opened, run_in, served  # noqa: F401 - a fixture
from trainer import preset as presets
from trainer import runner
from trainer.queue import Queue
from trainer.run import Run

pytestmark = pytest.mark.browser


@pytest.fixture
def server(tmp_path):
    """A run that takes long, and the app."""
    with served(tmp_path / "w", pace=0.03) as running:
        run_in(running.workspace, "long", rows=5)
        yield running
        for entry in Queue(running.workspace).waiting():
            entry.path.unlink()


def start(page, name, steps=3):
    page.get_by_role("tab", name="Preset").click()
    expect(page.get_by_label("Preset as TOML text")).not_to_have_value("")
    page.get_by_label("Preset as TOML text").fill(PRESET.format(steps=steps))
    page.get_by_role("textbox", name="Name of the run").fill(name)
    button(page, "Start training").click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()


def waiting(page):
    return page.get_by_role("region", name="Queue").locator("ol .st-name")


def test_a_second_start_waits_is_moved_cancelled_and_had_back(browser, server):
    with opened(browser, server.address) as page:
        button(page, "Resume from step 5").click()
        expect(page.locator(".st-run .st-badge")).to_have_text("training")
        for name in ("first", "second", "third"):
            start(page, name)
        expect(waiting(page)).to_have_text(["first", "second", "third"])
        expect(page.get_by_text("waits in the queue: place 3 of 3").first).to_be_visible()
        assert not (server.workspace / "runs" / "first").exists()
        earlier = button(page, "Earlier: third")
        earlier.focus()
        page.keyboard.press("Enter")
        expect(waiting(page)).to_have_text(["first", "third", "second"])
        expect(earlier).to_be_focused()
        page.keyboard.press("Enter")
        expect(waiting(page)).to_have_text(["third", "first", "second"])
        expect(button(page, "Later: third")).to_be_focused()
        button(page, "Cancel: first").click()
        expect(waiting(page)).to_have_text(["third", "second"])
        expect(button(page, "Undo")).to_be_focused()
        assert faults(page) == []
        page.keyboard.press("Enter")
        expect(waiting(page)).to_have_text(["third", "first", "second"])


def test_the_queue_outlives_the_app_its_runner_and_a_failing_run(browser, server):
    queue = Queue(server.workspace)
    with opened(browser, server.address) as page:
        button(page, "Resume from step 5").click()
        expect(page.locator(".st-run .st-badge")).to_have_text("training")
        start(page, "after", steps=40)
        missing = presets.parse(PRESET.format(steps=3).replace("pictures", "missing"), "p.toml")
        queue.add(missing, "faulty")
        queue.add(presets.parse(PRESET.format(steps=3), "p.toml"), "last")
        expect(waiting(page)).to_have_text(["after", "faulty", "last"])
        server.kill()
        kill_runner(server.workspace)
        assert not queue.is_served()
        server.start()
        expect(waiting(page)).to_have_text(["after", "faulty", "last"])
        page.get_by_role("link", name="long").click()
        button(page, "Stop").click()
        failed = page.get_by_role("region", name="Queue").locator(".st-queue-failed")
        expect(failed).to_contain_text("faulty", timeout=40_000)
        failed.locator("summary").click()
        expect(failed).to_contain_text("data.folder does not exist")
        assert faults(page) == []
        page.get_by_role("link", name="last").click()
        expect(page.locator(".st-run .st-badge")).to_have_text("done")
        assert Run(server.workspace / "runs" / "after").state().word == "done"
        button(page, "Dismiss: faulty").click()
        expect(page.get_by_role("region", name="Queue")).to_be_hidden()


def test_the_queue_is_clean_in_the_dark_and_on_a_phone(browser, server):
    for name in ("a run with quite a long name that does not fit into one line of the list", "b"):
        Queue(server.workspace).add(presets.parse(PRESET.format(steps=3), "p.toml"), name)
    with Queue(server.workspace).seat("") as seated, opened(browser, server.address, 390, "dark") as page:
        assert seated  # nothing begins
        expect(waiting(page)).to_have_count(2)
        assert faults(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def kill_runner(workspace):
    """The power is cut while a direct run goes on."""
    import psutil

    def running():
        return [process for process in psutil.process_iter(["cmdline"])
                if {"queue", "run", str(workspace)} <= set(process.info["cmdline"] or [])]

    end = time.monotonic() + 30  # it is a process that starts, like any other
    while not (own := running()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert runner.gpus(os.environ) == [""]
    for process in own:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


CARDS = """(() => { let studio, ask;
  const instead = async (server, name, request) => {
    const cards = [[0, "A", 8], [1, "B", 24], [3, "C", null]].map(([index, name, gib]) => ({ index, name, gib }));
    if (name === "list_cards") return { cards };
    if (name === "start_run") { globalThis.started = request.cards ?? []; return { run: request.run, waits: true }; }
    return ask(server, name, request); };
  Object.defineProperty(globalThis, "Studio", { get: () => studio, set: (value) => { studio = value;
    Object.defineProperty(value, "ask", { get: () => instead, set: (own) => { ask = own; } }); } }); })()"""


def test_a_run_takes_one_gpu_or_several_that_are_ticked(browser, server):
    with opened(browser, server.address) as page:
        page.add_init_script(CARDS)
        page.reload()
        page.get_by_role("tab", name="Preset").click()
        expect(page.get_by_label("Preset as TOML text")).not_to_have_value("")
        choose_gpus(page)


def choose_gpus(page):
    gpu, started = page.get_by_label("GPU", exact=True), lambda: page.evaluate("globalThis.started")

    def start():
        page.evaluate("delete globalThis.started")
        button(page, "Add to queue").click()
        page.wait_for_function("globalThis.started")
        page.get_by_role("tab", name="Preset").click()  # the run was shown
        return started()

    gpu.select_option("together")
    page.get_by_label("0: A, 8 GiB").uncheck()
    expect(page.get_by_text("so a step has 2 times as many")).to_be_visible()
    assert page.get_by_label("3: C").evaluate("box => getComputedStyle(box).appearance") == "auto"  # a tick is seen
    assert start() == [1, 3]
    for name in ("1: B, 24 GiB", "3: C"):
        page.get_by_label(name, exact=True).uncheck()
    button(page, "Add to queue").click()
    expect(page.get_by_text("Choose at least one GPU.").first).to_be_visible()
    gpu.select_option("1")
    assert start() == [1]
