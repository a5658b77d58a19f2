"""Data sets for the browser tests, and the tab that shows them."""

from __future__ import annotations

import random
from pathlib import Path

from playwright.sync_api import Page, expect

from app.datasets.library import _key
from tests.data_sets import draw, tree

TAGS = ("cat", "dog", "red", "blue", "outdoors", "simple background", "smile", "hat", "tree", "river")


def make(folder: Path, count: int, captions: dict[str, str] | None = None) -> Path:
    """Images 00.png, 01.png, … with captions of a few tags, or those that are given."""
    noise = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(count):
        text = ", ".join(["sks", *noise.sample(TAGS, 3)])
        draw(folder / f"{number:02d}.png", (96, 64), number, (captions or {}).get(f"{number:02d}", text))
    return folder


def texts(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith(".txt")}


def images(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith(".png") and "masklabel" not in name}


def use(page: Page, folder: Path, count: int) -> None:
    """Bring the tab to the front with a data set of the workspace, which has that many images."""
    page.evaluate("id => sessionStorage.setItem('studio.dataset', id)", f"{_key(folder.parent)}:{folder.name}")
    page.reload()
    show(page, count)


def show(page: Page, count: int) -> None:
    """Bring the tab to the front; its data set has that many images."""
    page.get_by_role("tab", name="Data set").click()
    expect(page.locator(".st-chosen")).to_contain_text(f"{count} image")
    if count:
        expect(page.locator(".st-tile textarea, .st-tile .st-chipbox").first).to_be_visible()


def caption(page: Page, name: str):
    return page.get_by_role("textbox", name=f"Caption of {name}", exact=True)


def card(page: Page, name: str):
    """The picture of a card."""
    return page.locator(".st-tile", has=page.get_by_text(name, exact=True)).locator(".st-thumb")


def panel(page: Page, name: str):
    page.locator(".st-tools").get_by_role("button", name=name, exact=True).click()
    return page.locator(".st-panel")


def undo(page: Page):
    return page.get_by_role("button", name="Undo", exact=False).and_(page.locator(".st-turn"))
