"""Makes the pictures of the guide, so that they stay true: `python -m tests.pictures_guide [--out DIR] [--shots DIR]`.

Goes the way of a newcomer in the real app: ten pictures of the demo become a data set, a preset, a run, and a file;
then a second method waits in the queue, and the two are compared.  Takes about five minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.app_browser import CHROMIUM, FLAGS
from tests.pictures import ROOT, WIDTHS, app, wait_for
from trainer.run import Run

QUALITY = 80  # of WebP
TABS = ("Train", "Data_set", "Preset", "Compare", "Export")
SMALL_WIDTH = {1440: 620, 390: 300}  # of a page on a sheet
SHEET_HEIGHT = 1.5  # of the window's
GAP = 12
STEPS = "60"
CONCEPT = ROOT / "presets" / "demo" / "concept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "presets" / "demo" / "pictures")
    parser.add_argument("--shots", type=Path, help="also keep every tab at two widths in two themes here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, app(Path(folder)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900}, accept_downloads=True)
        page.goto(address)
        newcomer(page, options.out, Path(folder))
        queue_and_compare(page, options.out, Path(folder))
        phone(browser, address, options.out / "guide_phone.webp")
        every_tab(browser, address, options.shots or Path(folder) / "shots")
        sheets(options.shots or Path(folder) / "shots", options.out)
        browser.close()


def newcomer(page: Page, out: Path, workspace: Path) -> None:
    """From the first start to the downloaded file, with a picture of each step."""
    button(page, "Use my own pictures").wait_for()
    shot(page, out / "guide_1_start.webp")
    pictures = sorted(CONCEPT.glob("*.png"))[:10]
    with page.expect_file_chooser() as chooser:
        button(page, "Use my own pictures").click()
    chooser.value.set_files([file for picture in pictures for file in (picture, picture.with_suffix(".txt"))])
    page.get_by_label("Name", exact=True).fill("my emoji")
    button(page, "Create and add").click()
    page.get_by_text("Added 10 images").wait_for(timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.st-tile img[src]').length >= 8")
    shot(page, out / "guide_2_pictures.webp")
    button(page, "Train with these pictures").click()
    page.get_by_text("No NVIDIA graphics card was found").wait_for()
    page.get_by_label("Steps", exact=True).fill(STEPS)
    page.get_by_label("Steps", exact=True).press("Tab")
    page.get_by_text("No NVIDIA graphics card was found").wait_for()
    page.wait_for_timeout(25_000)  # what training will take is being worked out
    page.evaluate("scrollTo(0, 0)")
    shot(page, out / "guide_3_preset.webp")
    button(page, "Start training").click()
    wait_for(lambda: Run(workspace / "runs" / "my emoji").state().step >= 30)
    shot(page, out / "guide_4_training.webp")


def queue_and_compare(page: Page, out: Path, workspace: Path) -> None:
    """A second method waits; when both are done they are set side by side."""
    page.get_by_role("tab", name="Preset").click()
    page.get_by_label("Method", exact=True).select_option("lora")
    page.wait_for_timeout(1500)
    page.get_by_role("textbox", name="Name of the run").fill("my emoji lora")
    button(page, "Start training").click()
    page.wait_for_timeout(2500)
    shot(page, out / "guide_queue.webp")
    for name in ("my emoji", "my emoji lora"):
        wait_for(lambda name=name: Run(workspace / "runs" / name).state().word == "done", 420)
    page.evaluate("Studio.goTo('Train'); Studio.chooseRun('my emoji')")
    page.get_by_role("link", name="Download my emoji.safetensors").wait_for(timeout=20_000)
    with page.expect_download():
        page.get_by_role("link", name="Download my emoji.safetensors").click()
    page.wait_for_timeout(2500)
    shot(page, out / "guide_5_result.webp")
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_timeout(3000)
    for box in page.locator(".st-cmp-side input[type=checkbox]").all():
        box.check()
    page.wait_for_timeout(4000)
    shot(page, out / "guide_compare.webp")


def phone(browser: Browser, address: str, path: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": WIDTHS[390]}, color_scheme="dark")
    page = context.new_page()
    page.goto(f"{address}?run=my%20emoji")
    page.wait_for_timeout(3500)
    shot(page, path)
    context.close()


def every_tab(browser: Browser, address: str, shots: Path) -> None:
    """To be looked at: each tab whole, at each width, in each theme."""
    shots.mkdir(parents=True, exist_ok=True)
    for width, height in WIDTHS.items():
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            page = context.new_page()
            page.goto(address)
            expect(page.get_by_role("tab", name="Train")).to_be_visible()
            for tab in page.get_by_role("tab").all():
                tab.click()
                page.wait_for_timeout(3000)
                name = (tab.text_content() or "").strip().replace(" ", "_")
                page.screenshot(path=shots / f"{name}_{width}_{theme}.png", full_page=True)
            context.close()


def sheets(shots: Path, out: Path) -> None:
    """Each tab's beginning side by side, a sheet for each width and theme."""
    for width, height in WIDTHS.items():
        size = SMALL_WIDTH[width], round(SMALL_WIDTH[width] * SHEET_HEIGHT * height / width)
        for theme in ("light", "dark"):
            sheet = Image.new("RGB", (len(TABS) * (size[0] + GAP) - GAP, size[1]), (128, 128, 128))
            for number, tab in enumerate(TABS):
                whole = Image.open(shots / f"{tab}_{width}_{theme}.png").convert("RGB")
                part = whole.crop((0, 0, whole.width, min(whole.height, round(SHEET_HEIGHT * height))))
                part = part.resize((size[0], round(size[0] * part.height / part.width)), Image.Resampling.LANCZOS)
                sheet.paste(part, (number * (size[0] + GAP), 0))
            sheet.save(out / f"tabs_{width}_{theme}.webp", quality=QUALITY, method=6)


def button(page: Page, name: str):  # noqa: ANN201 - a Locator
    return page.get_by_role("button", name=name, exact=True)


def shot(page: Page, path: Path) -> None:
    """What one sees, as WebP."""
    page.mouse.move(1, 1)
    page.wait_for_timeout(800)
    plain = path.with_suffix(".png")
    page.screenshot(path=plain)
    Image.open(plain).save(path, quality=QUALITY, method=6)
    plain.unlink()


if __name__ == "__main__":
    main()
