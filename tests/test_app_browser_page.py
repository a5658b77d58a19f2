"""The page as such: editing presets, what it costs, contrast and names, widths from a phone to a wall."""

import statistics
import subprocess
import sys
import time
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


def test_form_and_text_are_in_step(browser, server):
    with opened(browser, server.address) as page:
        edit_preset(page)
        rank = page.get_by_role("textbox", name="Rank")
        rank.fill("8")
        rank.press("Tab")
        expect(text_of(page)).to_have_value("# my own\n" + PRESET.format(steps=5) + "\n[adapter]\nrank = 8\n")
        expect(page.get_by_label("Alpha")).to_have_text("8")
        text_of(page).fill(PRESET.format(steps=77))
        expect(page.get_by_label("Steps", exact=True)).to_have_value("77")


def test_faults_are_told_as_one_types_at_field_line_and_top(browser, server):
    with opened(browser, server.address) as page:
        edit_preset(page)
        text_of(page).fill(PRESET.format(steps="-3") + "lrr = 1\n")
        expect(page.get_by_role("button", name="mine.toml:8: train.lrr: no such key. Did you mean lr?")).to_be_visible()
        expect(page.locator(".st-marked")).to_have_text(["7", "8"])
        expect(page.get_by_label("Steps", exact=True)).to_have_attribute("aria-invalid", "true")
        expect(button(page, "Start training")).to_be_disabled()
        text_of(page).fill("x = = 1")
        expect(page.get_by_text("The text is not valid TOML at the moment")).to_be_visible()
        text_of(page).fill(PRESET.format(steps=3))
        expect(button(page, "Start training")).to_be_enabled()
        expect(page.locator(".st-marked")).to_have_count(0)


def test_unsaved_text_survives_a_reload_and_another_preset(browser, server):
    with opened(browser, server.address) as page:
        edit_preset(page)
        text_of(page).fill(PRESET.format(steps=99))
        page.wait_for_timeout(400)
        page.reload()
        page.get_by_role("tab", name="Preset").click()
        expect(text_of(page)).to_have_value(PRESET.format(steps=99))
        page.get_by_label("Preset", exact=True).select_option("shipped/demo")
        expect(page.get_by_text("were set aside")).to_be_visible()
        button(page, "Bring them back").click()
        expect(text_of(page)).to_have_value(PRESET.format(steps=99))


def test_saving_under_a_taken_name_asks_first(browser, server):
    with opened(browser, server.address) as page:
        edit_preset(page)
        text_of(page).fill(PRESET.format(steps=12))
        button(page, "Save as…").click()
        page.get_by_label("Name", exact=True).fill("mine")
        button(page, "Save").last.click()
        expect(page.get_by_text("You have a preset of that name")).to_be_visible()
        button(page, "Cancel").last.click()
        assert (server.workspace / "presets/mine.toml").read_text().startswith("# my own")
        button(page, "Save as…").click()
        page.get_by_label("Name", exact=True).fill("other")
        page.get_by_label("Name", exact=True).press("Enter")
        expect(page.get_by_text("Saved as other.")).to_be_visible()
        assert (server.workspace / "presets/other.toml").read_text() == PRESET.format(steps=12)


def test_an_edited_preset_is_trained_as_it_stands(browser, server):
    with opened(browser, server.address) as page:
        edit_preset(page)
        text_of(page).fill(PRESET.format(steps=7))
        page.get_by_label("Name of the run").fill("edited")
        button(page, "Start training").click()
        expect(page.get_by_role("heading", name="edited")).to_be_visible()
        expect(page.locator(".st-run .st-badge")).to_have_text("done", timeout=30_000)
        expect(page.get_by_text("7 of 7").first).to_be_visible()


# What it costs


def test_the_page_is_usable_within_two_seconds(browser, server):
    times = []
    for _ in range(3):
        begun = time.monotonic()
        with opened(browser, f"{server.address}?run=crashed") as page:
            expect(curve(page, "Loss")).to_be_visible()
            times.append(time.monotonic() - begun)
    assert statistics.median(times) < 2


def test_a_live_view_of_3000_points_costs_at_most_a_kilobyte_a_second(browser, tmp_path):
    with served(tmp_path / "w", pace=1.0) as server:
        run_in(server.workspace, "long", rows=3000)
        with opened(browser, server.address) as page:
            button(page, "Resume from step 3000").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("training", timeout=20_000)
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
        assert [data for data in asked if data and "run" in data] == []


def test_eight_tabs_at_once_all_live(browser, server):
    context = browser.new_context()
    pages = [context.new_page() for _ in range(8)]
    for page in pages:
        page.goto(f"{server.address}?run=crashed")
    for page in pages:
        expect(curve(page, "Loss")).to_be_visible(timeout=20_000)
    context.close()


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
def test_no_tab_has_a_fault_against_wcag_aa(browser, server, tmp_path, theme, width):
    with opened(browser, server.address, width, theme, motion="reduce") as page:
        expect(page.locator(".st-matrix img").first).to_be_visible()
        assert faults(page) == []
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


@pytest.mark.parametrize("width", [390, 768, 1440, 2560])
def test_no_width_makes_the_page_scroll_sideways(browser, server, width):
    with opened(browser, f"{server.address}?run=crashed", width) as page:
        expect(curve(page, "Loss")).to_be_visible()
        for tab in ("Train", "Preset"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
