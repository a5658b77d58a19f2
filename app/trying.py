"""Trying LoRAs out: one process beside the app keeps the base model loaded, and draws what the page asks for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.bases import Bases
from app.exporting import Exporting
from app.paths import Places
from trainer.detached import Launch, start_detached
from trainer.errors import UserError
from trainer.export import header, texts
from trainer.export.formats import FAMILIES
from trainer.export.recognise import family_of
from trainer.tryout import origin, task
from trainer.tryout.task import PUT_AWAY, Draw, Settings, Task

TRYOUT = (sys.executable, "-m", "trainer.tryout")
Answer = dict[str, Any]


class Trying:
    """The try-outs of one workspace; the process ends by itself some minutes after the last request."""

    def __init__(self, places: Places, exporting: Exporting, bases: Bases, command: tuple[str, ...] = TRYOUT) -> None:
        self.places, self._exporting, self._bases = places, exporting, bases
        self._command = command
        self._launches: dict[str, Launch] = {}
        self._lock = threading.Lock()

    def about(self, id: str) -> Answer:
        """What the page begins with for a file: its family, its likely base, and its run's first sample prompt."""
        path = self._exporting.path(id)
        about = header.read(path)
        family, preset = family_of(about), origin.preset_of(path) if id.startswith("run:") else None
        rows = [row for row in self._bases.listing()["bases"] if row["family"] == family and row["ready"]]
        sample = preset.sample if preset else None
        triggers = ", ".join(texts.triggers(about.metadata))
        return {
            "family_name": FAMILIES[family], "bases": rows, "base": self._likely(id, path, about.metadata, rows),
            "prompt": sample.prompts[0] if sample and sample.prompts else triggers,
            "negative": sample.negative if sample else "", "seed": sample.seed if sample else 1,
            "steps": sample.steps if sample else 0, "guidance": sample.guidance if sample else None,
            "width": sample.width if sample else 0, "height": sample.height if sample else 0}

    def _likely(self, id: str, path: Path, said: Mapping[str, str], rows: list[Answer]) -> str:
        """The base that the file was trained on, if it is among these; "" when nothing tells."""
        if id.startswith("run:"):
            wanted = self._bases.settings(f"run:{id.partition(':')[2].partition('/')[0]}")
            return next((row["id"] for row in rows if self._bases.settings(row["id"]) == wanted), "")
        name = Path(origin.said_base(dict(said))).name
        named = [row["id"] for row in rows if name and row["label"].rpartition(" (")[0] in (name, Path(name).stem)]
        return named[0] if named else rows[0]["id"] if len(rows) == 1 else ""

    def ask(self, id: str, base: str, values: Mapping[str, Any]) -> Answer:
        """Post a request to the process that has the base, which is started when there is none."""
        draw = task.parse(Draw, {**values, "file": str(self._exporting.path(id))})
        settings = task.parse(Settings, self._bases.settings(base))
        family = family_of(header.read(Path(draw.file)))
        if family != settings.family:
            raise UserError(f"this LoRA is for {FAMILIES[family]}, and the base model is {FAMILIES[settings.family]}: "
                            "choose another base")
        with self._lock:
            found = self._process(settings)
            return {"task": found.name, "request": found.ask(draw)}

    def _process(self, settings: Settings) -> Task:
        """The living try-out of this base; others are asked to end, since each holds a whole model."""
        own = None
        for found in task.list_tasks(self.places.workspace):
            if self._lives(found):
                if own is None and not found.asked("stop") and found.settings() == settings:
                    own = found
                else:
                    found.request("stop")
        if own is None:
            own = task.create(self.places.workspace, settings)
            self._launches[own.name] = start_detached([*self._command, "--task", str(own.path)], own.log)
        return own

    def _lives(self, found: Task) -> bool:
        launch = self._launches.get(found.name)
        return found.is_held() or (launch is not None and launch.is_running)

    def read(self, name: str, request: int) -> Answer:
        """How far a request is, with its pictures at the end."""
        found = self._task(name)
        state = found.state(request)
        launch = self._launches.get(name)
        if state.word == "starting" and not found.is_held() and launch is not None and not launch.is_running:
            return {"word": "failed", "text": launch.last_words()}
        if state.text == PUT_AWAY and launch is not None and not launch.is_running and launch.process.returncode:
            return {"word": "failed", "text": "the program that draws broke off (code "
                    f"{launch.process.returncode}); perhaps the machine ran out of memory. Its log is {found.log}"}
        answer: Answer = {"word": state.word, "text": state.text, "done": state.done, "of": state.of}
        if state.pictures is not None:
            self.places.hand_out_pictures(found.pictures)
            answer |= {"pictures": {kind: (found.pictures / file).as_posix() for kind, file in state.pictures.items()},
                       "notes": list(state.notes), "seconds": state.seconds}
        return answer

    def stop(self, name: str) -> None:
        """Put the model away: the process ends."""
        found = self._task(name)
        if self._lives(found):
            found.request("stop")

    def close(self) -> None:
        """The app ends: so do the processes that it started."""
        for name, launch in self._launches.items():
            if launch.is_running:
                self._task(name).request("stop")

    def _task(self, name: str) -> Task:
        found = next((one for one in task.list_tasks(self.places.workspace) if one.name == name), None)
        if found is None:
            raise UserError("this try-out is over; ask for the picture again")
        return found
