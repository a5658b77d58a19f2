"""The page as such: what it costs, its theme, and contrast and names where something is wrong or nothing is there."""

import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_browser import PRESET, button, chromium, curve, faults, opened, run_in, served  # noqa: F401 - fixture

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A finished demo, a crashed run, a preset of one's own."""
    with served(tmp_path_factory.mktemp("app") / "w", pace=0) as running:
        crashed = run_in(running.workspace, "crashed", rows=30)
        crashed.log.write_text("Traceback (most recent call last):\nRuntimeError: CUDA out of memory\n")
        (running.workspace / "presets").mkdir()
        (running.workspace / "presets/mine.toml").write_text("# my own\n" + PRESET.format(steps=5))
        stand_in = Path(__file__).parent / "app_trainer.py"
        subprocess.run([sys.executable, stand_in, "--preset", running.workspace / "demo.toml", "--name", "demo",
                        "--workspace", running.workspace], check=True)
        yield running


def text_of(page):
    return page.get_by_label("Preset as TOML text")


def edit_preset(page):
    page.get_by_role("tab", name="Preset").click()
    choice = page.get_by_label("Preset", exact=True)
    expect(text_of(page)).not_to_have_value("")
    if choice.input_value() != "own/mine":
        choice.select_option("own/mine")
    expect(text_of(page)).to_have_value("# my own\n" + PRESET.format(steps=5))


# What it costs


@pytest.mark.timed
def test_the_page_is_usable_within_two_seconds(browser, server):
    """Where the machine is slow, it takes half as much again as a page of Gradio with next to nothing on it."""
    ours, nothing = [], []
    with nearly_nothing() as address:
        for _ in range(3):
            ours.append(until(browser, f"{server.address}?run=crashed", lambda page: curve(page, "Loss")))
            nothing.append(until(browser, address, lambda page: page.get_by_text("Next to nothing")))
    assert statistics.median(ours) < max(2, 1.5 * statistics.median(nothing)), (ours, nothing)


def until(browser, address, shown):
    """Seconds until this is seen."""
    begun = time.monotonic()
    with opened(browser, address) as page:
        expect(shown(page)).to_be_visible()
        return time.monotonic() - begun


@contextmanager
def nearly_nothing():
    """Gradio with one line of text, at this address."""
    program = ("import gradio, sys\nwith gradio.Blocks() as page:\n    gradio.Markdown('Next to nothing')\n"
               "print(page.launch(prevent_thread_lock=True, quiet=True)[1], flush=True)\nsys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=dict(os.environ, GRADIO_ANALYTICS_ENABLED="False"))
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


@pytest.mark.timed
def test_a_live_view_of_3000_points_costs_at_most_a_kilobyte_a_second(browser, tmp_path):
    with served(tmp_path / "w", pace=1.0) as server:
        run_in(server.workspace, "long", rows=3000)
        with opened(browser, server.address) as page:
            button(page, "Resume from step 3000").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("training")
            page.wait_for_timeout(3000)
            session = page.context.new_cdp_session(page)
            session.send("Network.enable")
            received = []
            session.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
            page.wait_for_timeout(10_000)
            assert len(received) > 8 and sum(received) / 10 < 1000


def test_nothing_is_asked_for_a_tab_that_is_not_shown(browser, server):
    with opened(browser, server.address) as page:
        expect(curve(page, "Loss")).to_be_visible()
        page.get_by_role("tab", name="Preset").click()
        page.wait_for_timeout(1500)
        asked = []
        page.on("request", lambda request: asked.append(request.post_data))
        page.wait_for_timeout(4000)
        assert [data for data in asked if data and re.search(r'"fn_name":"[a-z_]*run', data)] == []


# How it looks


def test_the_theme_is_the_systems_until_one_chooses(browser, server):
    with opened(browser, server.address, theme="dark") as page:
        button(page, "Light theme").click()
        assert not page.evaluate("document.body.classList.contains('dark')")
        page.reload()
        expect(button(page, "Dark theme")).to_be_visible()
        assert not page.evaluate("document.body.classList.contains('dark')")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_crash_and_a_faulty_preset_have_no_fault_against_wcag_aa(browser, server, tmp_path, theme, width):
    with opened(browser, server.address, width, theme, motion="reduce") as page:
        page.get_by_role("link", name="crashed").click()
        expect(page.get_by_text("CUDA out of memory")).to_be_visible()
        assert faults(page) == []
        edit_preset(page)
        text_of(page).fill(PRESET.format(steps="-3"))
        expect(page.locator(".st-marked")).to_have_count(1)
        assert faults(page) == []


def test_the_welcome_has_no_fault_either(browser, tmp_path):
    with served(tmp_path / "w") as server:
        for theme in ("light", "dark"):
            with opened(browser, server.address, 390, theme) as page:
                expect(button(page, "Run the demo")).to_be_visible()
                assert faults(page) == []
