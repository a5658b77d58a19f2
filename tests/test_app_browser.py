"""The app in a real browser: from the first click to the download, and through everything that goes wrong."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_browser import PRESET, button, chromium, curve, opened, run_in, served  # noqa: F401 - a fixture
from trainer import run
from trainer.events import EventWriter

pytestmark = pytest.mark.browser



def test_from_the_first_start_to_the_download_in_two_clicks(browser, tmp_path):
    with served(tmp_path / "w") as server, opened(browser, server.address) as page:
        button(page, "Run the demo").click()
        expect(page.get_by_role("heading", name="demo")).to_be_visible()
        expect(page.locator(".st-run .st-badge")).to_have_text("done")
        assert "?run=demo" in page.url
        for title in ("Loss", "Effective rank", "Learning rate", "Distance to held-out images"):
            expect(curve(page, title)).to_be_visible()
        expect(page.get_by_text("compared with the trained weights: worst relative error 3.4e-4.")).to_be_visible()
        expect(page.get_by_text("✓ All of it is read, at full strength, by ComfyUI, A1111.")).to_be_visible()
        expect(page.get_by_text("diffusers applies a plain LoRA instead.")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("link", name="Download demo.safetensors").click()
        assert download.value.suggested_filename == "demo.safetensors"
        assert Path(download.value.path()).read_bytes() == b"lora" * 1000
        pictures = page.locator(".st-matrix img")
        expect(pictures).to_have_count(4)
        page.locator(".st-matrix").scroll_into_view_if_needed()
        page.wait_for_function("[...document.querySelectorAll('.st-matrix img')].every((i) => i.naturalWidth === 64)")


def test_distances_are_labelled_honestly(browser, tmp_path):
    with served(tmp_path / "w", pace=0) as server, opened(browser, server.address) as page:
        button(page, "Run the demo").click()
        panel = page.get_by_role("region", name="Distance to held-out images")
        expect(panel.get_by_text("KID ×10³ 14.2 (95 %: 4.1 to 24.3) indicative only")).to_be_visible()
        expect(panel.get_by_text("FD-EffLite0-24 158 · floor 143 · base model 222")).to_be_visible()
        expect(panel.get_by_text("24 generated against 48 held-out images, extractor EffLite0")).to_be_visible()
        expect(panel.get_by_text("Closer to the held-out images than the base model, beyond both")).to_be_visible()
        assert page.evaluate("Studio.distanceName({extractor: 'FID-Inception', n_gen: 48})") == "FID-48"
        assert page.evaluate("Studio.distanceName({extractor: 'DINO', n_gen: 48})") == "FD-DINO-48"


def test_pause_continue_save_sample_stop_and_resume(browser, tmp_path):
    with served(tmp_path / "w", pace=0.05) as server:
        run_in(server.workspace, "long", rows=5)
        with opened(browser, server.address) as page:
            badge = page.locator(".st-run .st-badge")
            expect(badge).to_have_text("crashed")
            button(page, "Resume from step 5").click()
            expect(badge).to_have_text("training")
            button(page, "Pause").click()
            expect(badge).to_have_text("paused")
            button(page, "Continue").click()
            expect(badge).to_have_text("training")
            button(page, "Save now").click()
            expect(page.get_by_text("1 file of earlier steps")).to_be_visible()
            button(page, "Sample now").click()
            page.get_by_label("Prompts", exact=True).fill("a green frog\n\n a blue frog ")
            button(page, "Draw samples").click()
            expect(page.get_by_role("rowheader", name="a blue frog")).to_be_visible()
            button(page, "Stop").click()
            expect(badge).to_have_text("stopped")
            expect(page.get_by_role("button", name="Resume from step")).to_be_visible()


def test_a_reload_and_another_run_bring_back_the_whole_curve(browser, tmp_path):
    with served(tmp_path / "w") as server:
        run_in(server.workspace, "old", rows=300)
        run_in(server.workspace, "new", rows=20)
        with opened(browser, f"{server.address}?run=old") as page:
            whole = re.compile("Loss, steps 1 to 300. Newest: Each step 0.003333")
            expect(page.get_by_role("img", name=whole)).to_be_visible()
            page.get_by_role("link", name="new").click()
            expect(page.get_by_role("img", name="Loss, steps 1 to 20.")).to_be_visible()
            expect(page.get_by_role("img", name="Loss, steps 1 to 300.")).to_have_count(0)
            assert "run=new" in page.url
            page.reload()
            expect(page.get_by_role("img", name="Loss, steps 1 to 20.")).to_be_visible()
            expect(page.get_by_role("heading", name="new")).to_be_visible()


def test_a_killed_app_leaves_the_training_alone_and_the_page_goes_on_by_itself(browser, tmp_path):
    with served(tmp_path / "w", pace=0.05) as server:
        run_in(server.workspace, "long", rows=5)
        with opened(browser, server.address) as page:
            button(page, "Resume from step 5").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("training")
            page.evaluate("window.isSamePage = true")
            server.kill()
            lost = page.get_by_text("No answer from the server. Training goes on; trying again.")
            expect(lost).to_be_visible()
            before = run.open_run(server.workspace / "runs" / "long").state().step
            server.start()
            expect(lost).to_have_count(0)
            page.wait_for_function(f"parseInt(document.querySelector('.st-numbers dd').textContent) > {before}")
            assert page.evaluate("window.isSamePage")


def test_after_a_restart_with_a_password_the_page_asks_to_sign_in_again(browser, tmp_path):
    with served(tmp_path / "w", password="correct horse battery") as server:
        run_in(server.workspace, "a", rows=5)
        with opened(browser, server.address) as page:
            page.get_by_label("username").fill("studio")
            page.get_by_label("password").fill("correct horse battery")
            page.get_by_role("button", name="Login").click()
            expect(page.get_by_role("heading", name="a", exact=True)).to_be_visible()
            server.kill()
            server.start()
            expect(page.get_by_text("sign in again to go on")).to_be_visible()
            button(page, "Sign in").click()
            expect(page.get_by_role("button", name="Login")).to_be_visible()


def test_a_zoom_holds_while_the_run_goes_on(browser, tmp_path):
    with served(tmp_path / "w", pace=0.05) as server:
        run_in(server.workspace, "long", rows=200)
        with opened(browser, server.address) as page:
            button(page, "Resume from step 200").click()
            expect(page.locator(".st-run .st-badge")).to_have_text("training")
            over = page.locator(".st-charts section").first.locator(".u-over")
            over.hover(position={"x": 40, "y": 60})
            page.mouse.down()
            over.hover(position={"x": 160, "y": 60})
            page.mouse.up()
            page.mouse.move(5, 5)
            expect(button(page, "Show all steps")).to_be_visible()
            pixels = "document.querySelector('.st-plot canvas').toDataURL()"
            page.wait_for_timeout(300)
            before, step = page.evaluate(pixels), run.open_run(server.workspace / "runs/long").state().step
            page.wait_for_timeout(2500)
            assert page.evaluate(pixels) == before
            assert run.open_run(server.workspace / "runs/long").state().step > step + 5
            button(page, "Show all steps").click()
            page.wait_for_timeout(300)
            assert page.evaluate(pixels) != before


def test_charts_and_pictures_work_by_keyboard(browser, tmp_path):
    with served(tmp_path / "w", pace=0) as server, opened(browser, server.address) as page:
        button(page, "Run the demo").click()
        expect(page.locator(".st-run .st-badge")).to_have_text("done")
        curve(page, "Loss").focus()
        page.keyboard.press("+")
        expect(button(page, "Show all steps")).to_be_visible()
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".st-legend").first.get_by_role("columnheader", name="Step 30")).to_be_visible()
        page.keyboard.press("Escape")
        expect(button(page, "Show all steps")).to_be_hidden()
        button(page, "Enlarge Step 40: a sailing boat").focus()
        page.keyboard.press("Enter")
        viewer = page.get_by_role("dialog", name="Sample")
        expect(viewer.get_by_text("a sailing boat · Step 40 · seed 2")).to_be_visible()
        page.keyboard.press("ArrowUp")
        expect(viewer.get_by_text("a red apple · Step 40 · seed 1")).to_be_visible()
        page.keyboard.press("ArrowLeft")
        expect(viewer.get_by_text("a red apple · Base model · seed 1")).to_be_visible()
        page.keyboard.press("Escape")
        expect(viewer).to_be_hidden()
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Enlarge Step 40: a sailing boat"


def test_a_crash_shows_the_log_and_a_trainer_that_did_not_start_its_message(browser, tmp_path):
    with served(tmp_path / "w") as server:
        run_in(server.workspace, "broken", rows=7).log.write_text("Traceback\nRuntimeError: CUDA out of memory\n")
        (server.workspace / "presets").mkdir()
        (server.workspace / "presets/gone.toml").write_text(PRESET.format(steps=5).replace("pictures", "missing"))
        with opened(browser, server.address) as page:
            expect(page.get_by_text("RuntimeError: CUDA out of memory")).to_be_visible()
            expect(button(page, "Resume from step 7")).to_be_visible()
            button(page, "New run").click()
            page.get_by_label("Preset", exact=True).select_option("own/gone")
            button(page, "Start training").click()
            expect(page.get_by_text("missing does not exist")).to_be_visible()
            expect(page.get_by_role("button", name="Start again")).to_be_hidden()


def test_one_prompt_with_two_seeds_has_two_rows(browser, tmp_path):
    with served(tmp_path / "w") as server:
        ours = run_in(server.workspace, "twice", rows=5)
        ours.samples.mkdir()
        for name in ("a.png", "b.png"):
            (ours.samples / name).write_bytes(b"")
        writer = EventWriter(ours.events)
        writer.write("sample", step=5, images=["samples/a.png", "samples/b.png"], prompts=["a cat", "a cat"], seed=1)
        writer.close()
        with opened(browser, server.address) as page:
            expect(page.get_by_role("rowheader", name="a cat")).to_have_count(2)
