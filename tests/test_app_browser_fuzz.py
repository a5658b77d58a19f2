"""Random caption work in the real app, killed in the middle: nothing is lost or half written, and all is undone to the
last byte."""

import random
import re
import time

import pytest
from playwright.sync_api import expect

from app.datasets.journal import Journal
from app.datasets.operations import parse
from tests.app_browser import chromium, opened, served  # noqa: F401 - a fixture
from tests.app_pictures import caption, images, make, panel, texts, undo, use
from trainer import captions

pytestmark = pytest.mark.browser
COUNT, STEPS = 4, 5
PATIENCE = 60  # seconds: others use the machine
ODD = {"00": "\ufeffa cat, red\r\nsecond line\r\n", "01": "Ü, é, red\t\n\n", "02": ""}
ADDED = ("sks", "film grain", "Ünï")


class Sequence:
    """One data set with all states that its captions have had, as bytes of files."""

    def __init__(self, server, page, folder, seed):
        self.server, self.page, self.folder = server, page, folder
        self.rng = random.Random(seed)
        self.states = [texts(folder)]

    def edited(self, name, text):
        file = f"{name}.txt"
        return self.states[-1] | {file: captions.encode(text, like=self.states[-1].get(file, b""))}

    def added(self, text):
        change = parse({"kind": "add", "text": text}).editor({})
        state = self.states[-1]
        return {file: captions.encode(change(captions.decode(data, self.folder / file)).text, like=data)
                for file, data in state.items()}

    def edit(self, is_killed):
        name = f"{self.rng.randrange(COUNT):02d}"
        text = "".join(self.rng.choice("ab, \nüé") for _ in range(self.rng.randrange(1, 60))).strip() or "x"
        expected = self.edited(name, text)
        caption(self.page, f"{name}.png").fill(text)
        caption(self.page, f"{name}.png").press("Control+Enter")
        if is_killed:
            self.kill()
        self.arrive(expected)  # also after a kill: what was typed is sent again

    def bulk(self, is_killed):
        text = self.rng.choice(ADDED)
        expected = self.added(text)
        self.page.locator(".st-panel").get_by_label("Add", exact=True).fill(text)
        if expected == self.states[-1]:
            expect(self.page.get_by_text("No caption of all")).to_be_visible()
            return
        self.page.get_by_role("button", name=re.compile(r"^Change \d")).click()
        self.settle(expected, is_killed)

    def back(self, is_killed):
        if len(self.states) == 1:
            return
        undo(self.page).click()
        self.settle(self.states[-2], is_killed, is_undo=True)

    def settle(self, expected, is_killed, is_undo=False):
        """Wait for a state; after a kill it may also be the one before, but nothing in between."""
        if is_killed:
            self.kill()
            Journal(self.folder)  # ends what was under way, however slow the app is to open it
            if texts(self.folder) == self.states[-1]:
                return
        self.arrive(expected, is_undo)
        self.page.wait_for_timeout(1000)  # files change before the page hears of it; who types meanwhile is asked

    def arrive(self, expected, is_undo=False):
        deadline = time.monotonic() + PATIENCE
        while texts(self.folder) != expected and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
        assert texts(self.folder) == expected, self.page.locator("body").aria_snapshot()
        if is_undo:
            self.states.pop()
        elif expected != self.states[-1]:
            self.states.append(expected)

    def kill(self):
        """The app goes at any moment; it comes back, ends what was under way, and the page goes on by itself."""
        self.page.wait_for_timeout(self.rng.choice([0, 2, 5, 10, 20, 40]))
        self.server.kill()
        self.server.start()
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # ask at once
        expect(self.page.locator("#studio-connection")).to_be_empty(timeout=1000 * PATIENCE)
        self.page.wait_for_timeout(300)

    def run(self):
        killed = self.rng.randrange(STEPS)
        for step in range(STEPS):
            self.rng.choice([self.edit, self.edit, self.bulk, self.back])(step == killed)
        while entry := Journal(self.folder).next_undo():
            expect(undo(self.page)).to_have_text(f"Undo: {entry.what}", timeout=1000 * PATIENCE)
            undo(self.page).click()
            expect(self.page.get_by_text(f"Undone: {entry.what}.")).to_be_visible()
            self.page.evaluate("document.querySelector('.st-data .st-asked').textContent = ''")


def test_five_random_evenings_of_caption_work_lose_nothing(browser, tmp_path):
    with served(tmp_path / "w") as server:
        for seed in range(5):
            folder = make(server.workspace / f"datasets/{seed}", COUNT, ODD)
            before, pixels = texts(folder), images(folder)
            with opened(browser, server.address) as page:
                use(page, folder, COUNT)
                panel(page, "Bulk edit").get_by_label("What to do").select_option("add")
                Sequence(server, page, folder, seed).run()
                expect(caption(page, "01.png")).to_have_value("Ü, é, red\t\n\n")
            assert texts(folder) == before and images(folder) == pixels, f"sequence {seed}"
