"""What holds for every tab, whichever there are: quick to reach, no fault for screen readers, no sideways scrolling;
many tabs of the browser at once; and a run that is found again, whatever was closed or killed."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_browser import PRESET, button, chromium, curve, faults, opened, run_in, served  # noqa: F401 - a fixture
from tests.app_pictures import make
from trainer import run

pytestmark = pytest.mark.browser
SWITCH = 0.3  # seconds
WINDOWS = 8
SWITCHED = """async (index) => {
  const began = performance.now();
  document.querySelectorAll('#tabs button[role=tab]')[index].click();
  const panel = () => document.querySelectorAll('#tabs [role=tabpanel]')[index];
  const isThere = () => panel()?.offsetParent && panel().innerText.trim().length > 20;
  while (!isThere() && performance.now() - began < 5000) await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return (performance.now() - began) / 1000;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Something to show on each tab."""
    with served(tmp_path_factory.mktemp("app") / "w", pace=0) as running:
        make(running.workspace / "datasets/cats", 6)
        (running.workspace / "presets").mkdir()
        (running.workspace / "presets/mine.toml").write_text("# my own\n" + PRESET.format(steps=5))
        stand_in = Path(__file__).parent / "app_trainer.py"
        for name in ("demo", "demo-2"):
            subprocess.run([sys.executable, stand_in, "--preset", running.workspace / "demo.toml", "--name", name,
                            "--workspace", running.workspace], check=True)
        yield running


def tabs(page):
    """Each tab in turn, come to the front, by its name."""
    expect(page.get_by_role("tab", name="Train")).to_be_visible()
    for tab in page.get_by_role("tab").all():
        tab.click()
        expect(tab).to_have_attribute("aria-selected", "true")
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(600)
        yield tab.text_content().strip()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_no_tab_has_a_fault_against_wcag_aa(browser, server, theme, width):
    with opened(browser, server.address, width, theme, motion="reduce") as page:
        found = {name: faults(page) for name in tabs(page)}
        assert len(found) >= 5 and not any(found.values()), found


@pytest.mark.parametrize("width", [390, 768, 1440, 2560])
def test_no_tab_makes_the_page_scroll_sideways(browser, server, width):
    with opened(browser, server.address, width) as page:
        over = {name: page.evaluate("document.documentElement.scrollWidth - innerWidth") for name in tabs(page)}
        assert max(over.values()) <= 0, over


@pytest.mark.timed
def test_every_tab_is_there_in_a_third_of_a_second(browser, server):
    """The quickest of five: others may be using the machine."""
    with opened(browser, server.address) as page:
        names = list(tabs(page))
        times = [[page.evaluate(SWITCHED, index) for index in range(len(names))] for _ in range(5)]
        quickest = dict(zip(names, map(min, zip(*times))))
        assert max(quickest.values()) <= SWITCH, quickest


def test_eight_windows_on_a_running_run_are_all_live(browser, tmp_path):
    """A browser has six connections to a server: nothing may keep one."""
    with served(tmp_path / "w", pace=0.05) as server:
        run_in(server.workspace, "long", rows=5)
        context = browser.new_context()
        pages = [context.new_page() for _ in range(WINDOWS)]
        for page in pages:
            page.goto(server.address)
        button(pages[0], "Resume from step 5").click()
        for _ in range(2):
            at = run.open_run(server.workspace / "runs/long").state().step
            for page in pages:
                page.wait_for_function(f"parseInt(document.querySelector('.st-numbers dd').textContent) > {at}",
                                       timeout=30_000)
        context.close()


def test_a_closed_browser_and_a_killed_app_find_the_run_again_with_its_whole_curve(browser, tmp_path):
    with served(tmp_path / "w", pace=0.05) as server:
        run_in(server.workspace, "long", rows=5)
        ours = run.open_run(server.workspace / "runs/long")
        with opened(browser, server.address) as page:
            button(page, "Resume from step 5").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("training")
        at = wait_beyond(ours, 20)
        with opened(browser, server.address) as page:
            attached(page, at)
        server.kill()
        at = wait_beyond(ours, ours.state().step + 20)  # it goes on without the app
        server.start()
        with opened(browser, server.address) as page:
            attached(page, at)
            button(page, "Stop").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("stopped")
        steps = [int(step) for step in re.findall(r'"kind":"step","step":(\d+)', ours.events.read_text())]
        assert steps and steps == list(range(1, len(steps) + 1))  # none is missing, none was done twice


def attached(page, at):
    """The page shows the run at work, with its curve from the first step to one after `at`."""
    expect(page.locator(".st-run .st-badge")).to_have_text("training")
    expect(curve(page, "Loss")).to_be_visible()
    label = curve(page, "Loss").get_attribute("aria-label")
    first, last = map(int, re.match(r"Loss, steps (\d+) to (\d+)", label).groups())
    assert first == 1 and last >= at


def wait_beyond(ours, step):
    end = time.monotonic() + 60
    while (at := ours.state().step) <= step:
        assert time.monotonic() < end and ours.is_held()
        time.sleep(0.1)
    return at
