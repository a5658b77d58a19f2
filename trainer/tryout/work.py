"""Draws what is asked for, one request after the other, and leaves the GPU to runs in between."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer import gpu
from trainer.control import Requests, Stopped
from trainer.errors import UserError
from trainer.events import EventWriter
from trainer.faults import as_user_error, describe
from trainer.tryout.applied import Lora
from trainer.tryout.bench import Bench, Sampling
from trainer.tryout.task import Draw, Settings, Task, parse

POLL = 0.1  # seconds between two looks for a request
HELD_FOR = 20.0  # seconds for which the GPU is kept after a picture, for the next move of the slider
PACE = 0.2  # seconds between two events of one picture's progress


class Passed(Exception):
    """A newer request came: this one is not worth its time any more."""


class Desk:
    """Answers the requests of one task."""

    def __init__(self, task: Task, workspace: Path, requests: Requests, events: EventWriter) -> None:
        self.task, self.workspace, self.requests, self.events = task, workspace, requests, events
        self.settings: Settings = task.settings()
        self._bench: Bench | None = None
        self._turn = ExitStack()
        self._has_turn = False
        self._number = 0
        self._told: tuple[str, float] = ("", 0.0)
        self._plain: dict[str, str] = {}  # what a picture of the base model depends on -> its name

    def work(self) -> None:
        """Until a stop is asked for, or nothing was for some minutes."""
        last = time.monotonic()
        with self._turn:
            while True:
                self.requests.guard()
                idle = time.monotonic() - last
                if (taken := self.task.newest_draw()) is not None:
                    self._answer(*taken)
                    last = time.monotonic()
                elif idle > self.settings.idle_minutes * 60:
                    return
                else:
                    if self._has_turn and idle > HELD_FOR:
                        self._let_go()
                    time.sleep(POLL)

    def _answer(self, number: int, values: Mapping[str, Any]) -> None:
        """Draw one request; whatever goes wrong is told of it, and the next may do better."""
        self._number, self._told = number, ("", 0.0)
        self.events.write("phase", request=number, name="starting")  # before its file goes, so that it is never missed
        self.task.drop_draws(number)
        begun = time.monotonic()
        try:
            draw = parse(Draw, values)
            bench = self._open()
            self._take_turn(bench)
            lora = bench.lora(Path(draw.file))
            chosen = bench.sampling(draw, lora)
            pictures = {"with": self._draw(bench, draw, lora, chosen)}
            if draw.without:
                pictures["without"] = self._draw_plain(bench, draw, lora, chosen)
            self.events.write("drawn", request=number, pictures=pictures, notes=bench.remarks(lora), steps=chosen.steps,
                              guidance=chosen.guidance, width=chosen.width, height=chosen.height,
                              sec=round(time.monotonic() - begun, 2))
        except Passed:
            self.events.write("passed", request=number)
        except Stopped:
            self.events.write("failed", request=number, error="the model was put away before this was drawn")
            raise
        except Exception as error:
            plain = as_user_error(error) if isinstance(error, UserError | OSError) else None
            if plain is None:
                traceback.print_exc()
            self.events.write("failed", request=number, error=str(plain or describe(error)))

    def _open(self) -> Bench:
        if self._bench is None:
            self._tell("opening the base model", 0, 0)
            self._bench = Bench(self.settings, self._tell)
        return self._bench

    def _tell(self, name: str, done: int, of: int) -> None:
        """Progress of the present request; and whether it is still wanted."""
        self.requests.guard()
        if self.task.newer_waits():
            raise Passed
        now = time.monotonic()
        if name != self._told[0] or now - self._told[1] > PACE or 0 < of == done:
            self._told = name, now
            self.events.write("phase", request=self._number, name=name, done=done, of=of)

    def _take_turn(self, bench: Bench) -> None:
        """Wait until no run uses the GPU."""
        if self._has_turn:
            return
        said = False

        def on_wait() -> None:
            nonlocal said
            if not said:
                self.events.write("waiting", request=self._number)
                said = True
            self.requests.guard()
            if self.task.newer_waits():
                raise Passed

        self._turn.enter_context(gpu.turn(self.workspace, bench.device, on_wait))
        self._has_turn = bench.device.type == "cuda"

    def _let_go(self) -> None:
        """A run may want the GPU: its memory is given back with the turn."""
        if self._bench is not None:
            self._bench.park()
        self._turn.close()
        self._has_turn = False

    def _draw(self, bench: Bench, draw: Draw, lora: Lora, chosen: Sampling) -> str:
        name = f"{self._number:06d}.png"
        picture = bench.picture(draw, lora, chosen, "drawing with the LoRA", with_lora=True)
        save(self.task.pictures / name, picture, draw, chosen, draw.strength)
        return name

    def _draw_plain(self, bench: Bench, draw: Draw, lora: Lora, chosen: Sampling) -> str:
        """The base model's own picture, drawn once for all strengths."""
        key = json.dumps([draw.prompt, draw.negative, draw.seed, *vars(chosen).values()])
        if key not in self._plain:
            name = f"{self._number:06d}-base.png"
            picture = bench.picture(draw, lora, chosen, "drawing without it", with_lora=False)
            save(self.task.pictures / name, picture, draw, chosen, 0.0)
            self._plain[key] = name
        return self._plain[key]


def save(path: Path, picture: Image.Image, draw: Draw, chosen: Sampling, strength: float) -> None:
    """A PNG with its settings inside; it gets its name when it is whole."""
    facts = {"prompt": draw.prompt, "negative": draw.negative, "seed": draw.seed, "strength": strength,
             "lora": Path(draw.file).name if strength else "", **vars(chosen)}
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(facts, ensure_ascii=False))
    aside = path.with_suffix(".tmp")
    picture.save(aside, format="PNG", pnginfo=info)
    aside.replace(path)


def serve(task: Task, workspace: Path) -> None:
    """Be the process of a task. Raises `UserError` when another is."""
    with task.hold(), Requests(task) as requests:
        events = EventWriter(task.events)
        try:
            events.write("start")
            Desk(task, workspace, requests, events).work()
            events.write("end", reason="idle")
        except Stopped:
            events.write("end", reason="stopped")
        except BaseException as error:
            with suppress(OSError):  # the disk may be full
                events.write("end", reason="error", error=describe(error))
            raise
        finally:
            events.close()
