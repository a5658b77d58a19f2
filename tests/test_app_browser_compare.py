"""The tab "Compare" in a real browser: runs side by side, live, a comparison from one preset, and what can be saved."""

import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.app_browser import PRESET, button, chromium, curve, faults, opened, served  # noqa: F401 - a fixture
from tests.run_folders import finished
from trainer.events import EventWriter

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An app with three seeds of two methods, and a preset to compare more with."""
    workspace = tmp_path_factory.mktemp("app") / "w"
    for seed in (0, 1, 2):
        for method, loss in (("lora", 0.3), ("stella", 0.2 + seed * 0.01)):
            run = finished(workspace, f"first-{method}-r16-s{seed}", f'adapter.method="{method}"', f"train.seed={seed}",
                           validation=loss, kid=(100 * loss, 80 * loss, 120 * loss))
            run.samples.mkdir()
            Image.new("RGB", (64, 64), (200, 60 * seed, 90)).save(run.samples / "000100_00.png")
            events = EventWriter(run.events)
            events.write("sample", step=100, images=["samples/000100_00.png"], prompts=["a cat <b>"], seed=1)
            events.write("end", step=100, reason="done", trained_sec=60.0 if method == "lora" else 90.0)
    (workspace / "presets").mkdir()
    (workspace / "presets" / "small.toml").write_text(PRESET.format(steps=30))
    with served(workspace) as running:
        yield running


def test_chosen_runs_stand_side_by_side_and_become_a_report(browser, server):
    with opened(browser, server.address) as page:
        page.get_by_role("tab", name="Compare").click()
        expect(page.get_by_text("Choose runs from the list")).to_be_visible()
        for seed in (0, 1, 2):
            for method in ("lora", "stella"):
                page.get_by_role("checkbox", name=f"first-{method}-r16-s{seed}").check()
        numbers = page.get_by_role("region", name="Numbers of the settings")
        expect(numbers.get_by_role("row", name=re.compile("stella.*3 runs.*0.21.*lowest"))).to_be_visible()
        expect(numbers.get_by_role("row", name=re.compile("lora.*higher than stella"))).to_be_visible()
        expect(page.get_by_text("validation loss: stella is below lora by 0.09")).to_be_visible()
        assert page.get_by_text("3 paired seeds").count() == 2
        for title in ("Validation loss", "Training loss, smoothed", "Effective rank"):
            expect(curve(page, title)).to_be_visible()
        front = re.compile("KID .* against time. On the front: stella, lora")
        expect(page.get_by_role("img", name=front)).to_be_visible()
        shots = page.get_by_role("region", name="Samples side by side")
        expect(shots.get_by_label("Prompt")).to_contain_text("a cat <b>")
        shots.scroll_into_view_if_needed()
        page.wait_for_function("[...document.querySelectorAll('.st-cmp-shots img')].every((i) => i.naturalWidth == 64)")
        expect(shots.locator("img")).to_have_count(2)
        button(page, "lora").click()  # the legend
        expect(curve(page, "Validation loss")).to_have_attribute("aria-label", re.compile("Newest: stella 0.21"))
        with page.expect_download() as download:
            button(page, "Save report").click()
        report = Path(download.value.path()).read_text()
        assert download.value.suggested_filename == "Comparison.html" and "stella is below lora" in report
        page.get_by_label("Run of the card").select_option("first-stella-r16-s1")
        with page.expect_download() as download:
            button(page, "Save run card").click()
        assert download.value.suggested_filename == "first-stella-r16-s1.html"
        assert faults(page) == []
        page.reload()
        page.get_by_role("tab", name="Compare").click()
        expect(numbers).to_be_visible()  # what was chosen is kept


def test_a_comparison_from_one_preset_is_planned_started_and_followed_live(browser, server):
    with opened(browser, server.address, width=390, theme="dark") as page:
        page.get_by_role("tab", name="Compare").click()
        button(page, "New comparison").click()
        form = page.get_by_role("form", name="New comparison")
        form.get_by_label("Preset").select_option(label="small")
        expect(form.get_by_text("9 runs: 3 methods × 3 seeds")).to_be_visible()
        expect(form.get_by_text("nothing is held out, so that nothing will tell")).to_be_visible()
        form.get_by_label("Ranks").fill("0")
        expect(form.get_by_text("rank 0: should be greater than or equal to 1")).to_be_visible()
        expect(button(form, "Start")).to_be_disabled()
        form.get_by_label("Ranks").fill("4")
        form.get_by_label("Seeds").fill("5")
        form.get_by_label("Stiefel").uncheck()
        form.get_by_label("Name").fill("pair")
        assert faults(page) == []
        button(form, "Start 2 runs").click()
        expect(page.get_by_role("heading", name="pair")).to_be_visible()
        expect(page.get_by_text("2 runs: 2 done.")).to_be_visible(timeout=60_000)
        expect(curve(page, "Training loss, smoothed")).to_have_attribute("aria-label", re.compile("steps 1 to 30"))
        expect(page.get_by_role("button", name="pair 2 runs from small")).to_have_attribute("aria-pressed", "true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390 and faults(page) == []


def test_the_run_view_saves_the_run_card_too(browser, server):
    with opened(browser, f"{server.address}?run=first-lora-r16-s0") as page:
        with page.expect_download() as download:
            button(page, "Save run card").first.click()
        html = Path(download.value.path()).read_text()
        assert download.value.suggested_filename == "first-lora-r16-s0.html" and "sd15 · lora, rank 16" in html
        expect(page.get_by_text("The run card is saved")).to_be_visible()


def test_without_any_run_the_tab_says_what_to_do(browser, tmp_path):
    with served(tmp_path / "w") as empty, opened(browser, empty.address) as page:
        page.get_by_role("tab", name="Compare").click()
        expect(page.get_by_text("There are no runs yet.")).to_be_visible()
        button(page, "New comparison").click()
        expect(page.get_by_role("form", name="New comparison").get_by_label("Preset")).to_contain_text("demo")
