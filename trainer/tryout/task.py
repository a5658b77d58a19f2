"""What trying a LoRA out asks for, and the folder through which the app and the process that draws speak."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from trainer import preset
from trainer.errors import UserError
from trainer.events import Event, last_event, newest_events
from trainer.files import write_atomic
from trainer.schema import Model, Section, setting
from trainer.workfolder import WorkFolder

PUT_AWAY = "the model was put away; ask again"
KEPT = 3  # folders of earlier try-outs
Asked = TypeVar("Asked", bound=Section)


class Settings(Model):
    """The base model, and where it works; as a preset's section [model]."""

    device: str = setting("auto", "auto, cpu, cuda, or one of several GPUs as cuda:1.",
                          pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Arithmetic. auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU.")
    quantize: Literal["none", "fp8", "int8", "nf4"] = setting("none", "Hold the base model in fewer bits.")
    idle_minutes: float = setting(10.0, "End after so many minutes without a request.", gt=0, le=1440)


class Draw(Section):
    """One picture: a LoRA, a prompt, a strength. What is 0 or left out is the file's own, or the family's."""

    file: str = setting(..., "The LoRA, a .safetensors file.", min_length=1)
    prompt: str = setting("", "What to draw.", max_length=10_000)
    negative: str = setting("", "What to keep away from, where the model has classifier-free guidance.",
                            max_length=10_000)
    strength: float = setting(1.0, "How strongly the LoRA counts; 1 is what was trained.", ge=-4, le=4)
    seed: int = setting(1, "Of the noise that the picture begins with.", ge=0, le=2**32 - 1)
    steps: int = setting(0, "Sampler steps; 0: 4 for distilled models, else 20.", ge=0, le=200)
    guidance: Annotated[float, Field(ge=0.0, le=50.0)] | None = setting(None, "Guidance; left out: the family's own.")
    width: int = setting(0, "Width in pixels; 0: what the file was trained at.", ge=0, le=4096)
    height: int = setting(0, "Height in pixels; 0: what the file was trained at.", ge=0, le=4096)
    without: bool = setting(False, "Draw the base model's own picture beside it.")


@dataclass(frozen=True)
class State:
    """How far a request is: a word for the program, a text for a person, steps done and in all, and its pictures."""

    word: Literal["starting", "waiting", "drawing", "done", "failed", "ended"]
    text: str
    done: int = 0
    of: int = 0
    pictures: Mapping[str, str] | None = None  # "with" and perhaps "without": names below `pictures`
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class Task(WorkFolder):
    """The files of one process that tries LoRAs of one base out."""

    work = "used"

    def __init__(self, path: Path) -> None:
        super().__init__(path, "tryout.log")
        self.pictures = path / "pictures"
        self._settings = path / "settings.json"

    def settings(self) -> Settings:
        """The base and where it works.  Raises `UserError` for a folder that is none of a try-out."""
        try:
            return parse(Settings, json.loads(self._settings.read_bytes()))
        except (OSError, ValueError):
            raise UserError(f"{self.path}: no folder of a try-out (it has no settings.json that can be read)") from None

    def ask(self, draw: Draw) -> int:
        """Post a request; its number.  Only the newest is drawn: those before it are passed over."""
        number = max([*self._numbers(), *(event.get("request", 0) for event in self._events())], default=0) + 1
        write_atomic(self.control / f"draw-{number:06d}.json", draw.model_dump_json().encode())
        return number

    def newest_draw(self) -> tuple[int, dict[str, Any]] | None:
        """The newest request and its number, if one waits; it waits until `drop_draws`."""
        numbers = self._numbers()
        if not numbers:
            return None
        try:
            content = json.loads((self.control / f"draw-{numbers[-1]:06d}.json").read_bytes())
        except (OSError, ValueError):
            content = {}
        return numbers[-1], content if isinstance(content, dict) else {}

    def drop_draws(self, up_to: int) -> None:
        """Take away this request and those before it: it is being drawn, and they are passed over."""
        for number in self._numbers():
            if number <= up_to:
                (self.control / f"draw-{number:06d}.json").unlink(missing_ok=True)

    def newer_waits(self) -> bool:
        """Whether another picture is asked for by now."""
        return bool(self._numbers())

    def state(self, request: int) -> State:
        """How far a request is; one that a newer has overtaken ended."""
        (events, held), waits = self.look(self._events), request in self._numbers()
        own = [event for event in events if event.get("request") == request]
        last = own[-1] if own else last_event(self.events) or {}
        if last.get("kind") in ("drawn", "failed", "passed") and last in own:
            return _ended(last)
        if not held:
            text = next((str(event["error"]) for event in reversed(events) if event.get("error")), "")
            word = "failed" if text else "starting" if waits and not events else "ended"
            return State(word, text or ("starting" if word == "starting" else PUT_AWAY))
        if not waits and any(event.get("request", 0) > request for event in events):
            return State("ended", "a newer request took its place")
        if last.get("kind") == "waiting":
            return State("waiting", "a run is using the GPU; this waits for its end")
        text, done, of = str(last.get("name", "starting")), int(last.get("done", 0)), int(last.get("of", 0))
        return State("drawing" if own else "starting", text, done, of)

    def _events(self) -> list[Event]:
        return newest_events(self.events)

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem[5:]) for path in self.control.glob("draw-*.json") if path.stem[5:].isdecimal())


def _ended(event: Event) -> State:
    if event["kind"] == "failed":
        return State("failed", str(event["error"]))
    if event["kind"] == "passed":
        return State("ended", "a newer request took its place")
    return State("done", "done", pictures=dict(event["pictures"]), notes=tuple(event["notes"]), seconds=event["sec"])


def parse(kind: type[Asked], values: Mapping[str, Any]) -> Asked:
    """Checked settings or a checked request; `UserError` with one line a fault."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(f"{problem.where}: {problem.text}"
                                  for problem in preset.found_in("tryout", kind, error))) from None


def create(workspace: Path, settings: Settings) -> Task:
    """The folder of a new try-out, numbered on: workspace/tryouts/0001; old ones that are over are taken away."""
    root = workspace / "tryouts"
    root.mkdir(parents=True, exist_ok=True)
    for old in list_tasks(workspace)[KEPT:]:
        if not old.is_held():
            shutil.rmtree(old.path, ignore_errors=True)
    number = max((int(path.name) for path in root.iterdir() if path.name.isdigit()), default=0)
    while True:
        number += 1
        task = Task(root / f"{number:04d}")
        try:
            task.path.mkdir()
            break
        except FileExistsError:  # another one was quicker
            continue
    task.control.mkdir()
    task.pictures.mkdir()
    write_atomic(task._settings, settings.model_dump_json(indent=2).encode())
    return task


def list_tasks(workspace: Path) -> list[Task]:
    """All try-outs of a workspace, the newest first."""
    return [Task(path.parent) for path in sorted((workspace / "tryouts").glob("*/settings.json"), reverse=True)
            if path.parent.name.isdigit()]


def trained_side(metadata: Mapping[str, str]) -> int:
    """The side in pixels that a file says it was trained at; 0 when it does not say."""
    for text in (metadata.get("modelspec.resolution", ""), metadata.get("ss_resolution", "").strip("()")):
        side = text.replace(",", "x").partition("x")[0].strip()
        if side.isdecimal() and 64 <= int(side) <= 4096:
            return int(side)
    return 0
