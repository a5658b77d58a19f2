"""Automatic captions for the app: starts the captioner as a process of its own, follows it, hands its results over."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from app import form
from app.paths import Places
from trainer.caption import task
from trainer.caption.task import Suggestion, Task
from trainer.detached import Launch, start_detached
from trainer.errors import UserError

CAPTIONER = (sys.executable, "-m", "trainer.caption")
ENTRY = "Automatic captions"  # what the journal calls them

# What the form offers; any other hub id or folder of these kinds may be typed.
MODELS = (
    {"id": "florence-community/Florence-2-base-ft", "label": "Florence-2 base: quick, plain sentences",
     "instruction": "<DETAILED_CAPTION>", "needs": "0.5 GB download, runs on a CPU"},
    {"id": "florence-community/Florence-2-large-ft", "label": "Florence-2 large: sentences with more detail",
     "instruction": "<MORE_DETAILED_CAPTION>", "needs": "1.6 GB download"},
    {"id": "Salesforce/blip-image-captioning-large", "label": "BLIP large: one short sentence", "instruction": "",
     "needs": "1.9 GB download, runs on a CPU"},
    {"id": "Qwen/Qwen2.5-VL-3B-Instruct", "label": "Qwen2.5-VL 3B: does as the instruction says", "instruction": "",
     "needs": "7.5 GB download, a GPU with 10 GB"},
    {"id": "Qwen/Qwen3-VL-4B-Instruct", "label": "Qwen3-VL 4B: does as the instruction says", "instruction": "",
     "needs": "9 GB download, a GPU with 12 GB"},
    {"id": "SmilingWolf/wd-swinv2-tagger-v3", "label": "WD tagger: comma-separated tags for drawings",
     "instruction": "", "needs": "0.5 GB download, runs on a CPU"},
)


@dataclass(frozen=True)
class Progress:
    """What a task is doing, in a word and in a sentence, how far it is, and the images it passed over."""

    word: str
    text: str
    done: int
    of: int
    alive: bool
    skipped: list[dict[str, str]]


class Captions(Protocol):
    """What a data set must be able to do to take results over."""

    root: Path

    def apply_captions(self, what: str, texts: Mapping[str, str],
                       before: Mapping[str, str] | None = None) -> dict[str, Any]: ...


class Captioning:
    """The captioning tasks of one workspace.  Nothing depends on this object living: tasks go on without it."""

    def __init__(self, places: Places, captioner: tuple[str, ...] = CAPTIONER) -> None:
        self.places = places
        self._captioner = captioner
        self._launches: dict[str, Launch] = {}
        self._lock = threading.Lock()

    def describe(self) -> list[dict[str, Any]]:
        """The settings for a form; the folder and the images are the data set's."""
        described = form.describe_section(task.SECTION, task.Settings)
        return [field for field in described if field["key"] not in ("folder", "images")]

    def start(self, folder: Path, settings: Mapping[str, Any]) -> str:
        """Begin a task; its name.  Raises `UserError` for wrong settings, and while another works on the folder."""
        checked = task.parse({**settings, "folder": str(folder)})
        with self._lock:
            busy = self.latest(folder)
            if busy and self.progress(busy).alive:
                raise UserError(f"captions of {folder} are being written already; stop that first, or wait for its end")
            new = task.create(self.places.workspace, checked)
            self._launches[new.name] = start_detached([*self._captioner, "--task", str(new.path)], new.log)
        return new.name

    def progress(self, name: str) -> Progress:
        """How far a task is."""
        found = self._task(name)
        state, launch = found.state(), self._launches.get(name)
        if state.word == "starting" and not state.alive and launch is not None:
            if launch.is_running:
                state = task.State("starting", "starting the captioner", alive=True)
            else:
                state = task.State("failed", launch.last_words())
        return Progress(state.word, state.text, state.done, state.of, state.alive or state.word == "starting",
                        found.skipped())

    def cancel(self, name: str) -> None:
        """Ask a task to stop; what it has proposed so far stays."""
        self._task(name).request("stop")

    def results(self, name: str, start: int = 0) -> list[Suggestion]:
        """What is proposed so far, from the `start`-th on."""
        return self._task(name).suggestions(start)

    def latest(self, folder: Path) -> str | None:
        """The newest task of a folder that was not dismissed: how a tab that was reloaded finds it again."""
        wanted = str(folder.resolve())
        for found in task.list_tasks(self.places.workspace):
            try:
                if found.settings().folder == wanted:
                    return found.name
            except UserError:  # settings of another version of the program
                continue
        return None

    def apply(self, name: str, captions: Captions, images: Collection[str] | None = None) -> dict[str, Any]:
        """Put proposals (all, or those of the named images) into the captions, as one entry that can be undone.

        A caption that was changed since the model was asked stays; it is told among "skipped".  Raises `UserError` when
        the task is another data set's, which may have images of the same names.
        """
        asked = self._task(name).settings().folder
        if asked != str(captions.root.resolve()):
            raise UserError(f"these captions were proposed for the images in {asked}, and not for those in "
                            f"{captions.root}; open that data set to apply them")
        wanted = [item for item in self.results(name) if images is None or item.image in images]
        return captions.apply_captions(ENTRY, {item.image: item.after for item in wanted},
                                       {item.image: item.before for item in wanted})

    def dismiss(self, name: str) -> None:
        """Throw a task away that is over; one that works is to be stopped first."""
        if self.progress(name).alive:
            raise UserError("this task is still at work; stop it first")
        shutil.rmtree(self._task(name).path)
        self._launches.pop(name, None)

    def _task(self, name: str) -> Task:
        found = {item.name: item for item in task.list_tasks(self.places.workspace)}
        if name not in found:
            raise UserError(f"there is no captioning task {name[:100]!r}")
        return found[name]


def as_rows(suggestions: list[Suggestion]) -> list[dict[str, str]]:
    """Proposals as the browser takes them."""
    return [asdict(item) for item in suggestions]
