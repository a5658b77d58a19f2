"""The way of somebody who has never seen the app: from the first start to a LoRA of their own ten pictures."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_browser import chromium, faults, opened  # noqa: F401 - a fixture
from tests.data_sets import draw

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
FEWEST = 10  # clicks that would be too many
STEPS = 11  # one more than the warm-up


@contextmanager
def real_app(workspace):
    """The app with the real trainer, as `launch.py` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen([sys.executable, "-m", "app", "--port", str(port), "--workspace", str(workspace)],
                               cwd=ROOT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the app ended"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()
        for control in workspace.glob("runs/*/control"):
            (control / "stop").touch()


class Hand:
    """Does what a newcomer does, and counts it: each press, each pick in the system's dialog, each word typed."""

    def __init__(self, page):
        self.page, self.clicks = page, 0

    def press(self, name):
        self.clicks += 1
        found = self.page.get_by_role("button", name=name, exact=True).or_(
            self.page.get_by_role("link", name=name, exact=True))
        expect(found).to_be_enabled()
        found.click()

    def choose(self, opener, files):
        """Open the system's dialog, mark files in it, and press its button."""
        with self.page.expect_file_chooser() as chooser:
            self.press(opener)
        self.clicks += 2
        chooser.value.set_files(files)

    def type(self, label, text):
        self.clicks += 1
        self.page.get_by_label(label, exact=True).fill(text)
        self.page.get_by_label(label, exact=True).press("Tab")


def ten(folder):
    for number in range(10):
        draw(folder / f"{number}.png", (160, 128), number)
    return sorted(folder.glob("*.png"))


def test_ten_pictures_become_a_lora_in_less_than_ten_clicks(browser, tmp_path):
    pictures = ten(tmp_path / "camera")
    with real_app(tmp_path / "w") as address, opened(browser, address) as page:
        hand = Hand(page)
        hand.choose("Use my own pictures", pictures)
        hand.press("Create and add")
        expect(page.get_by_text("Added 10 images.")).to_be_visible()
        hand.press("Train with these pictures")
        expect(page.get_by_text("No NVIDIA graphics card was found")).to_be_visible()
        hand.type("Steps", str(STEPS))  # only for the test's sake
        hand.press("Start training")
        badge = page.locator(".st-run .st-badge")
        expect(badge).to_have_text("done", timeout=240_000)
        with page.expect_download() as download:
            hand.press("Download my pictures.safetensors")
        assert hand.clicks < FEWEST
        assert download.value.suggested_filename == "my pictures.safetensors"
        steps = page.get_by_role("navigation", name="Your first LoRA, in five steps")
        expect(steps.get_by_text("You have made and used your first LoRA.")).to_be_visible()
        assert faults(page) == []
        file = tmp_path / "my pictures.safetensors"
        download.value.save_as(file)
    verified = subprocess.run([sys.executable, "-m", "trainer.export", "verify", str(file), "--base",
                               str(ROOT / "presets/demo/base"), "--json"], cwd=ROOT, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    report = json.loads(verified.stdout)
    assert report["family"] == "sd15" and report["layers"] and not report["faults"]
    assert "my pictures" in (tmp_path / "w/presets/my pictures.toml").read_text()
