"""What `python -m trainer --check` says of a preset, asked in a process of its own, since the app never loads torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import form
from app.paths import Places, inside
from trainer import preset
from trainer.detached import TRAINER, Launch, start_detached

Answer = dict[str, Any]
HOLDS = 600.0  # seconds: the data set or the GPU may be another by then
FORGOTTEN = 15.0  # seconds after which a check that no page asks for is stopped
MOST = 100  # results that are kept


@dataclass
class Check:
    """One text, waiting, being looked at, or looked at."""

    folder: Path
    name: str
    text: str
    asked: float  # monotonic
    launch: Launch | None = None
    report: Answer = field(default_factory=dict)
    at: float = 0.0  # unix seconds of the report


class Checks:
    """Checks of one workspace, one at a time; each is known by a key, which its text and its file's name make."""

    def __init__(self, places: Places, trainer: tuple[str, ...] = TRAINER) -> None:
        self._places = places
        self._trainer = trainer
        self._checks: dict[str, Check] = {}
        self._lock = threading.Lock()

    def begin(self, text: str, name: str, folder: Path, again: bool = False) -> str:
        """See to it that a text is checked; returns its key.  Raises `UserError` for one with faults.

        folder: what its paths are relative to.  again: also when the answer is known.
        """
        name = f"{name or 'preset'}.toml"
        settled = form.settled(text, folder)
        preset.parse(settled, name)
        key = hashlib.sha256(f"{name}\0{settled}".encode()).hexdigest()[:24]
        with self._lock:
            known = self._checks.get(key)
            if known is None or (known.report and (again or time.time() - known.at > HOLDS)):
                place = inside(self._places.workspace / "cache" / "checks", key)
                self._checks[key] = Check(place, name, settled, time.monotonic())
            self._go_on()
        return key

    def read(self, key: str) -> Answer:
        """How far a check is: "waiting", "running" with its seconds, or "done" with the report and when it was made.

        "unknown": it was stopped, or forgotten.
        """
        with self._lock:
            if (check := self._checks.get(key)) is None:
                return {"state": "unknown"}
            check.asked = time.monotonic()
            self._go_on()
            if check.report:
                return {"state": "done", "report": check.report, "at": check.at}
            if check.launch is None:
                return {"state": "waiting"}
            return {"state": "running", "seconds": round(time.time() - check.launch.at, 1)}

    def stop(self, key: str) -> None:
        """The page has another text by now: nobody waits for this answer."""
        with self._lock:
            check = self._checks.get(key)
            if check and not check.report:
                self._drop(key)
            self._go_on()

    def _go_on(self) -> None:
        """Take what has ended, stop what nobody asks for, begin what waits."""
        now = time.monotonic()
        for key, check in list(self._checks.items()):
            if check.report:
                continue
            if check.launch and not check.launch.is_running:
                check.report, check.at = _report(check.launch, check.name), time.time()
                shutil.rmtree(check.folder, ignore_errors=True)
            elif now - check.asked > FORGOTTEN:
                self._drop(key)
        done = [key for key, check in self._checks.items() if check.report]
        for key in done[:-MOST]:
            del self._checks[key]
        if not any(check.launch and not check.report for check in self._checks.values()):
            waiting = next((check for check in self._checks.values() if not check.report), None)
            if waiting:
                waiting.launch = self._launch(waiting)

    def _launch(self, check: Check) -> Launch:
        file = check.folder / "draft.toml"  # not its name, which the page gave
        preset.save(file, check.text)
        return start_detached([*self._trainer, "--preset", str(file), "--check", "--json", "--workspace",
                               str(self._places.workspace)], check.folder / "report")

    def _drop(self, key: str) -> None:
        check = self._checks.pop(key)
        if check.launch and check.launch.is_running:
            check.launch.process.kill()
            check.launch.process.wait()
        shutil.rmtree(check.folder, ignore_errors=True)


def _report(launch: Launch, name: str) -> Answer:
    """The report among whatever libraries wrote beside it; what was said instead becomes its error."""
    text = launch.log.read_text(encoding="utf-8", errors="replace") if launch.log.exists() else ""
    decoder = json.JSONDecoder()
    starts = [place for place in range(len(text)) if text[place] == "{" and (place == 0 or text[place - 1] == "\n")]
    for start in reversed(starts):
        try:
            found, _ = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if isinstance(found, dict) and {"errors", "warnings", "facts"} <= found.keys():
            return {"errors": found["errors"], "warnings": found["warnings"], "facts": found["facts"],
                    "numbers": found.get("numbers", {})}
    return {"errors": [f"{name} could not be checked: {launch.last_words()}"], "warnings": [], "facts": {},
            "numbers": {}}
