"""What the data set tab costs in a browser with thousands of images: python -m tests.bench.dataset_browser

    python -m tests.bench.dataset_browser --images 5000 --folder /tmp/bench     (the folder is kept, and used again)

Uses the images and thumbnails of `tests.bench.dataset`, makes what is missing, starts the app on them, and measures in
Chromium: until the tab can be used, scrolling, searching, a bulk preview, saving, going to the next caption; and the
memory of the app's process with its thumbnails' workers gone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
from playwright.sync_api import Page, expect, sync_playwright

from app.datasets.library import Library
from app.paths import Places
from tests.app_browser import CHROMIUM, FLAGS, Server, served
from tests.app_pictures import caption, panel
from tests.bench.dataset import make_images, say

TIMES = 5
FRAMES = """async ([seconds, pixels]) => {
  const grid = document.querySelector('.st-grid');
  const gaps = [];
  let last = performance.now();
  const end = last + 1000 * seconds;
  while (last < end) {
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - last);
    last = now;
    grid.scrollTop += pixels;
  }
  return gaps;
}"""


ANSWERED = """() => { window.answered = new Promise((done) => {
  let began = 0;
  const field = document.querySelector('.st-finder input');
  field.addEventListener('input', () => { began = performance.now(); }, { once: true });
  new MutationObserver((_, observer) => { observer.disconnect(); done(performance.now() - began); })
    .observe(document.querySelector('.st-chosen'), { subtree: true, childList: true, characterData: true });
}); }"""


def warm(workspace: Path, images: int) -> str:
    """The data set with all thumbnails made; its name."""
    library = Library(Places(workspace))
    root = library.places.datasets / f"bench{images}"
    if not root.exists():
        make_images(root, images)
    [id] = [row["id"] for row in library.list_sets()["sets"] if row["name"] == root.name]
    data_set = library.open(id)
    while data_set.index.known() < len(data_set.index.records):
        time.sleep(0.5)
        data_set.info()
    library.close()
    return id


def timed(page: Page, work: Callable[[], object], done: Callable[[], object]) -> float:
    """Milliseconds, the driver's own few included."""
    began = time.perf_counter()
    work()
    done()
    return (time.perf_counter() - began) * 1000


def measure_opening(page: Page, address: str, images: int) -> None:
    shown, times = page.locator(".st-tile img[src]"), []
    for _ in range(TIMES):
        page.goto(address)
        page.get_by_role("tab", name="Data set").wait_for()
        times.append(timed(page, page.get_by_role("tab", name="Data set").click, lambda: (
            expect(shown.nth(5)).to_be_visible(), page.wait_for_function(
                "[...document.querySelectorAll('.st-tile img[src]')].slice(0, 6).every(image => image.naturalWidth)"))))
    say(f"tab clicked, {images} images: cards with pictures", median(times), 2000)
    whole = timed(page, lambda: page.goto(address), lambda: (
        page.get_by_role("tab", name="Data set").click(), expect(shown.nth(5)).to_be_visible()))
    say("page opened, tab clicked: cards with pictures", whole, 2000)


def measure_scrolling(page: Page) -> None:
    for name, pixels in (("slowly", 12), ("quickly", 120), ("by whole screens", 900)):
        page.locator(".st-grid").evaluate("element => { element.scrollTop = 0; }")
        page.wait_for_timeout(500)
        gaps = sorted(page.evaluate(FRAMES, [4, pixels]))
        print(f"scrolling {name:22} {len(gaps) / 4:6.1f} frames a second, 95 % of the frames within "
              f"{gaps[int(0.95 * len(gaps))]:.0f} ms   wanted: at least 50")


def measure_work(page: Page, images: int) -> None:
    page.locator(".st-grid").evaluate("element => { element.scrollTop = 0; }")
    search, found = page.get_by_label("Search in captions"), page.locator(".st-chosen")
    times = []
    for word in ("number4321", "smiling grain", "number12", "red"):
        page.evaluate(ANSWERED)
        search.fill(word)
        times.append(page.evaluate("window.answered"))
    say("search: from the last key to the cards", median(times), 100)
    search.fill("")
    expect(found).to_contain_text(f"{images:,} images")
    bulk = panel(page, "Bulk edit")
    told, times = bulk.get_by_role("status"), []
    for word in ("cat", "dog", "house", "e"):
        times.append(timed(page, lambda w=word: bulk.get_by_label("Find").fill(w), lambda: (
            page.wait_for_timeout(30), expect(told).to_contain_text("would change"))))
        page.evaluate("document.querySelector('.st-panel [role=status]').textContent = ''")
    say("bulk preview: from the last key, with 180 ms pause", median(times), 680)
    panel(page, "Bulk edit")
    first = page.locator(".st-tile textarea").first
    name = first.get_attribute("aria-label").removeprefix("Caption of ")
    times = []
    field = caption(page, name)
    for number in range(TIMES):
        field.fill(f"text {number} of {time.time()}")
        began = time.perf_counter()
        with page.expect_response(lambda answer: "save_caption" in (answer.request.post_data or "")):
            field.press("Control+Enter")
        times.append((time.perf_counter() - began) * 1000)
    say("caption typed, Ctrl-Enter, saved", median(times))


def memory(server: Server) -> float:
    """Megabytes of the app's process."""
    assert server.process
    return psutil.Process(server.process.pid).memory_info().rss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    id = warm(options.folder.resolve(), options.images)
    with served(options.folder.resolve()) as server, sync_playwright() as playwright:
        print(f"memory of the app before anybody looked: {memory(server):.0f} MB")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(server.address)
        page.evaluate("id => sessionStorage.setItem('studio.dataset', id)", id)
        measure_opening(page, server.address, options.images)
        measure_scrolling(page)
        measure_work(page, options.images)
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
        print(f"memory of the app: {memory(server):.0f} MB   wanted: at most 300; of the page's scripts: {heap:.0f} MB")
        browser.close()


if __name__ == "__main__":
    main()
