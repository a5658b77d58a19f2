"""The Run view in a real browser: what was measured of a run, and what can be done with it."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.app_browser import button, chromium, curve, faults, late, opened, run_in, served  # noqa: F401 - a fixture
from tests.measured_run import PROMPTS, measured
from trainer import run as runs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A run that stopped early, and one of an older trainer, which measured none of the finer things."""
    with served(tmp_path_factory.mktemp("app") / "w", pace=0.02) as running:
        run_in(running.workspace, "old", rows=30)
        measured(running.workspace)
        yield running


def card(page, name):
    return page.get_by_role("region", name=name, exact=True)


def look(browser, server, name="measured", **options):
    return opened(browser, f"{server.address}?run={name}", **options)


# What was measured


def test_what_was_measured_is_shown_and_an_older_run_does_without(browser, server):
    with look(browser, server) as page:
        expect(page.locator(".st-run .st-badge")).to_have_text("stopped early")
        expect(card(page, "Validation loss by noise level").get_by_role("row")).to_have_count(5)
        bins = card(page, "Training loss by noise level")
        expect(bins.get_by_text("Since the beginning: little noise (fine detail) −47 %")).to_be_visible()
        bins.get_by_text("As numbers").click()
        expect(bins.get_by_role("row", name="0.3 to 0.4 0.075 0.04 −47 %")).to_be_visible()
        expect(page.get_by_text("step 200KID ×10³ 14.2 (95 %: 4.1 to 24.3)")).to_be_visible()
        expect(page.get_by_text("It is clearly the lowest.", exact=True)).to_be_visible()
        page.get_by_role("link", name="old").click()
        expect(page.get_by_role("img", name="Loss, steps 1 to 30.")).to_be_visible()
        for name in ("Effective rank by block", "Images that are hard to learn", "Training loss by noise level"):
            expect(card(page, name)).to_be_hidden()
        expect(page.locator(".st-bestline")).to_be_hidden()


def test_a_run_that_is_left_and_chosen_again_has_its_whole_curve(browser, server):
    with look(browser, server) as page:
        curve = page.get_by_role("img", name=re.compile(r"^Loss, steps 1 to "))
        name = curve.get_attribute("aria-label")
        with late(page, "read_run"):
            page.evaluate("() => { Studio.chooseRun('old'); Studio.chooseRun('measured'); }")
        page.wait_for_timeout(300)
        expect(page.get_by_role("img", name=name, exact=True)).to_be_visible()
        expect(page.locator(".st-run .st-badge")).to_have_text("stopped early")


def test_a_cell_of_the_map_leads_to_its_spectrum_by_keyboard_and_by_mouse(browser, server):
    with look(browser, server) as page:
        blocks = card(page, "Effective rank by block")
        expect(blocks.get_by_label("Effective rank of 5 blocks")).to_be_visible()
        blocks.locator("canvas").focus()
        for key in ("ArrowLeft", "ArrowDown", "ArrowLeft", "Enter"):
            page.keyboard.press(key)
        expect(blocks.get_by_role("heading", name="Spectrum of down 1 at step 175")).to_be_visible()
        expect(blocks.get_by_text("Effective rank 8.25 of 16")).to_be_visible()
        blocks.locator("canvas").click(position={"x": 400, "y": 5})
        expect(blocks.get_by_role("heading", name=re.compile("Spectrum of down 0 at step"))).to_be_visible()
        blocks.get_by_text("As numbers").click()
        button(page, "Show the spectrum of up 1").click()
        expect(blocks.get_by_role("heading", name="Spectrum of up 1 at step 200")).to_be_visible()


def test_a_hard_image_leads_to_its_caption(browser, server):
    with look(browser, server) as page:
        hard = card(page, "Images that are hard to learn")
        rows = hard.locator("tbody tr")
        expect(rows.first).to_contain_text("cat07.png3 ×")
        expect(rows).to_have_count(8)
        expect(hard).to_contain_text("12 images measured, 9 harder than the usual")
        button(page, "Show 9").click()
        expect(rows).to_have_count(9)
        expect(rows.first.locator("img")).to_be_visible()
        button(page, "cat07.png").click()
        caption = page.get_by_role("dialog", name="Image").get_by_label("Caption")
        expect(caption).to_have_value("sks cat number 7")
        page.keyboard.press("Escape")
        page.get_by_role("tab", name="Train").click()
        button(page, "cat03.png").click()  # the tab is there by now
        expect(caption).to_have_value("sks cat number 3")


def test_a_sample_is_uncovered_over_the_base_model_or_any_other_step(browser, server):
    with look(browser, server) as page:
        button(page, "Enlarge Step 200: a sailing boat").click()
        viewer = page.get_by_role("dialog", name="Sample")
        slider = viewer.get_by_role("slider", name="Uncover")
        expect(slider).to_have_attribute("aria-valuetext", "50 % of Base model, 50 % of Step 200")
        slider.focus()
        page.keyboard.press("ArrowRight")
        expect(viewer.locator(".st-over")).to_have_css("clip-path", "inset(0px 49% 0px 0px)")
        viewer.get_by_label("Compare with").select_option("Step 100")
        expect(viewer.get_by_alt_text("Step 100: a sailing boat")).to_be_visible()
        button(page, "Earlier step").click()
        expect(viewer.get_by_text("a sailing boat · Step 150 · seed 43")).to_be_visible()
        expect(slider).to_have_attribute("aria-valuetext", "51 % of Step 100, 49 % of Step 150")
        viewer.get_by_label("Compare with").select_option("Nothing")
        expect(slider).to_be_hidden()
        assert faults(page) == []


# What can be done


def test_notes_are_saved_as_typed_and_two_windows_lose_nothing(browser, server):
    notes = server.workspace / "runs/old/notes.md"
    with look(browser, server, "old") as page, look(browser, server, "old") as other:
        page.get_by_label("Your notes").fill("the rate was too high")
        expect(card(page, "Notes").get_by_text("Saved", exact=True)).to_be_visible()
        assert notes.read_text() == "the rate was too high"
        mine = other.get_by_label("Your notes")
        expect(mine).to_have_value("the rate was too high")
        other.context.set_offline(True)
        mine.fill("my own words")
        page.get_by_label("Your notes").fill("the rate was right")
        expect(card(page, "Notes").get_by_text("Saved", exact=True)).to_be_visible()
        other.context.set_offline(False)
        button(other, "Keep both").click()
        expect(card(other, "Notes").get_by_text("Saved", exact=True)).to_be_visible()
        assert notes.read_text() == "the rate was right\n\nmy own words"
        expect(page.get_by_label("Your notes")).to_have_value("the rate was right\n\nmy own words")


def test_a_checkpoint_is_kept_and_branched_from(browser, server):
    with look(browser, server) as page:
        pin = button(page, "Keep the checkpoint of step 100")
        pin.click()
        expect(pin).to_have_text("✓ Kept")
        assert runs.open_run(server.workspace / "runs/measured").is_pinned(100)
        expect(card(page, "Checkpoints").get_by_role("row", name="Step 200 ★ best")).to_be_visible()
        button(page, "Branch from step 150").click()
        form = page.get_by_role("dialog", name="Branch")
        form.get_by_label("Changed settings, one a line").fill("train.lrr = 1")
        button(form, "Start the branch").click()
        expect(form.get_by_role("alert")).to_contain_text("train.lrr")
        form.get_by_label("Changed settings, one a line").fill("train.lr = 5e-5\n\n# a remark\ntrain.steps = 170")
        form.get_by_label("Name of the new run").fill("a branch")
        button(form, "Start the branch").click()
        expect(page.get_by_role("heading", name="a branch", exact=True)).to_be_focused()
        expect(page.locator(".st-run .st-badge")).to_have_text("done")
        expect(page.get_by_text("170 of 170").first).to_be_visible()
        expect(page.get_by_role("heading", name="a branch", exact=True)).to_be_focused()
    assert "lr = 5e-5" in (server.workspace / "runs/a branch/preset.toml").read_text().replace("5e-05", "5e-5")


def test_prompts_are_changed_for_the_samples_to_come(browser, server):
    with look(browser, server) as page:
        button(page, "Prompts…").click()
        form = page.get_by_role("dialog", name="Prompts of this run")
        text = form.get_by_label("Prompts of this run, one a line")
        expect(text).to_have_value("\n".join(PROMPTS))
        text.fill(" \n")
        button(form, "Use these prompts").click()
        expect(form.get_by_role("alert")).to_have_text("Give at least one prompt.")
        text.fill("a green frog\n\na blue frog ")
        button(form, "Use these prompts").click()
        expect(page.get_by_text("the next samples are drawn for these prompts")).to_be_visible()
    posted = server.workspace / "runs/measured/control/prompts"
    assert json.loads(posted.read_text()) == ["a green frog", "a blue frog"]


def test_a_run_gets_another_name_goes_to_the_trash_and_comes_back(browser, server):
    run_in(server.workspace, "first name", rows=3)
    with look(browser, server, "first name") as page:
        button(page, "Rename…").click()
        form = page.get_by_role("dialog", name="Rename the run")
        form.get_by_label("Name of the run").fill("old")
        button(form, "Rename").click()
        expect(form.get_by_role("alert")).to_contain_text("old")
        form.get_by_label("Name of the run").fill("second name")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="second name")).to_be_visible()
        expect(page.get_by_role("link", name="first name")).to_have_count(0)
        button(page, "Delete").click()
        expect(page.get_by_text("second name is in the trash.")).to_be_visible()
        expect(page.get_by_role("link", name="second name")).to_have_count(0)
        expect(page.get_by_role("heading", name="second name")).to_have_count(0)
        expect(button(page, "Undo")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="second name")).to_be_visible()
        expect(page.get_by_role("img", name="Loss, steps 1 to 3.")).to_be_visible()


# How it looks


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (390, "light"), (1440, "light"), (1440, "dark")])
def test_the_view_is_clean_at_each_width_in_each_theme(browser, server, width, theme):
    with look(browser, server, width=width, theme=theme, motion="reduce") as page:
        expect(page.locator(".st-hard tbody img").first).to_be_visible()
        expect(page.locator(".st-matrix img").first).to_be_visible()
        expect(page.get_by_label("Effective rank of 5 blocks")).to_be_visible()
        page.locator("canvas.st-heat").focus()
        page.keyboard.press("Enter")
        expect(page.locator(".st-spectrum svg")).to_be_visible()
        assert faults(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_every_measure_is_explained_by_keyboard(browser, server):
    with look(browser, server) as page:
        expect(page.locator(".st-hard tbody tr").first).to_be_visible()
        for what in ("loss", "effective rank", "validation loss by noise level", "training loss by noise level",
                     "the map of effective rank", "hard images", "a checkpoint", "the best checkpoint"):
            mark = page.locator(f'summary[aria-label="What is {what}?"]')
            mark.focus()
            page.keyboard.press("Enter")
            text = mark.locator("xpath=..").locator(".st-help-text")
            expect(text).to_be_visible()
            expect(text).to_have_attribute("style", re.compile("left"))  # it was moved to where there is room
            box = text.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 1440, what
            page.keyboard.press("Escape")
            expect(text).to_be_hidden()


def test_a_press_is_not_lost_when_the_list_is_drawn_anew_meanwhile(browser, server):
    with look(browser, server) as page:
        expect(curve(page, "Loss")).to_be_visible()
        page.get_by_role("link", name="old").hover()
        with page.expect_response(lambda response: "list_runs" in (response.request.post_data or "")):
            page.mouse.down()
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(100)
        page.mouse.up()
        expect(page.get_by_role("heading", name="old", exact=True)).to_be_visible()
