"""Makes the pictures of the README, so that they stay true: `python -m tests.pictures [--out DIR]`.

Starts the real app in an empty workspace, runs the demo by its button, and takes the page at two widths in two
themes; then trains the demo with each method and sets its samples beside the base model's.  Takes about six minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright

from tests.app_browser import CHROMIUM, FLAGS
from trainer.run import Run

ROOT = Path(__file__).parent.parent
METHODS = ("lora", "stiefel", "stella")
WIDTHS = {1440: 900, 390: 844}
PORT = 7869
CELL, LABEL = 128, 100  # pixels of a sample, and of the column with the rows' names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "presets" / "demo" / "pictures")
    parser.add_argument("--shots", type=Path, help="also keep every screenshot here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        shoot(workspace, options.out, options.shots)
        for method in METHODS:
            train(workspace, method)
        before_and_after(workspace, options.out / "before_after.png")


def shoot(workspace: Path, out: Path, shots: Path | None) -> None:
    """The welcome page, the demo while it trains, and its end."""
    with app(workspace) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        keep(browser, address, shots, "welcome")
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(address)
        page.get_by_role("button", name="Run the demo", exact=True).click()
        run = Run(workspace / "runs" / "demo")
        wait_for(lambda: run.state().step >= 60)
        keep(browser, f"{address}?run=demo", shots, "training")
        wait_for(lambda: not run.state().alive and run.state().word != "new")
        assert run.state().word == "done", run.state()
        keep(browser, f"{address}?run=demo", shots, "done")
        picture(page, f"{address}?run=demo", out / "app.png")
        export(page, address, out / "export.webp")
        browser.close()


def export(page: Page, address: str, path: Path) -> None:
    """The tab "Export" with the demo's result tried out."""
    page.goto(address)
    page.get_by_role("tab", name="Export", exact=True).click()
    form = page.get_by_role("form", name="Try it", exact=True)
    form.get_by_label("Prompt", exact=True).fill("openmoji style, red apple, fruit")
    form.get_by_role("button", name="Draw", exact=True).click()
    form.get_by_text("Drawn in").wait_for(timeout=120_000)
    page.wait_for_timeout(500)
    shot = path.with_suffix(".png")
    page.screenshot(path=shot, full_page=True)
    Image.open(shot).save(path, quality=85, method=6)
    shot.unlink()
    form.get_by_role("button", name="Put the model away", exact=True).click()


@contextmanager
def app(workspace: Path):
    """The app as a person starts it; yields its address."""
    address = f"http://127.0.0.1:{PORT}/"
    command = [sys.executable, "-m", "app", "--port", str(PORT), "--workspace", str(workspace)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for(lambda: answers(address))
        yield address
    finally:
        process.terminate()
        process.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True


def wait_for(condition, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def keep(browser, address: str, shots: Path | None, name: str) -> None:
    """The whole page, at each width and in each theme."""
    if shots is None:
        return
    shots.mkdir(parents=True, exist_ok=True)
    for width, height in WIDTHS.items():
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            picture(context.new_page(), address, shots / f"{name}_{width}_{theme}.png")
            context.close()


def picture(page: Page, address: str, path: Path) -> None:
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(2500)  # charts are drawn after the first answer
    page.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    page.wait_for_function("[...document.querySelectorAll('img')].every((image) => image.complete)")
    page.screenshot(path=path, full_page=True)


def train(workspace: Path, method: str) -> None:
    command = [sys.executable, "-m", "trainer", "--preset", "demo.toml", "--workspace", str(workspace)]
    command += ["--name", method, "--set", f"adapter.method={method}", "--set", "evaluate.distance=off"]
    subprocess.run(command, cwd=ROOT, check=True)


def before_and_after(workspace: Path, path: Path) -> None:
    """A grid: the base model's pictures, then each method's after the last step."""
    rows = [("base model", "lora", 0), *((method, method, 150) for method in METHODS)]
    count = len(list((workspace / "runs" / "lora" / "samples").glob("000000_??.png")))
    grid = Image.new("RGB", (LABEL + count * CELL, len(rows) * CELL), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, name, step) in enumerate(rows):
        draw.text((8, row * CELL + CELL // 2 - 6), label, fill="black", font_size=14)
        for column in range(count):
            sample = Image.open(workspace / "runs" / name / "samples" / f"{step:06d}_{column:02d}.png")
            grid.paste(sample.resize((CELL, CELL)), (LABEL + column * CELL, row * CELL))
    grid.save(path, optimize=True)


if __name__ == "__main__":
    main()
