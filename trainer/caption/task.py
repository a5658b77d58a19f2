"""A captioning task: what is asked for, and the folder through which captioner and app speak to each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from trainer import preset
from trainer.errors import UserError
from trainer.events import EventReader, last_event
from trainer.files import write_atomic
from trainer.schema import Section, setting
from trainer.workfolder import WorkFolder

SECTION = "captioning"  # names a setting in messages
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(Section):
    folder: str = setting(..., "Folder with the images; sub-folders count too.", path=True, min_length=1)
    model: str = setting(..., "The captioner: a hub id, or a folder. With model.onnx and selected_tags.csv: a tagger.",
                         path=True, min_length=1)
    images: list[str] = setting([], "Only these images, named from the folder on. Empty: all but the excluded.",
                                advanced=True)
    mode: Literal["missing", "replace", "append"] = setting(
        "missing", "missing: only images without a caption. replace: all. append: put the new text behind the old.")
    instruction: str = setting("", "What the model is asked. Empty: its usual question.", kind="text")
    prefix: str = setting("", "Put before every caption, such as a trigger word.")
    preview: int = setting(0, "Only so many images, to see how it does; 0: all.", ge=0, le=1_000_000)
    threshold: Share = setting(0.35, "Tagger: how sure it must be of a tag.")
    character_threshold: Share = setting(0.85, "Tagger: how sure it must be of a character's name.")
    blacklist: list[str] = setting([], "Tagger: tags that are never written.")
    underscores: bool = setting(False, "Tagger: write long_hair instead of long hair.", advanced=True)
    max_tokens: int = setting(200, "Where a long answer is cut off.", advanced=True, ge=1, le=4096)
    batch_size: int = setting(4, "Images at a time; halved by itself when memory runs out.", advanced=True, ge=1,
                              le=256)
    device: str = setting("auto", "auto, cpu, cuda, or one of several GPUs as cuda:1.", advanced=True,
                          pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Arithmetic. auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU.", advanced=True)


@dataclass(frozen=True)
class State:
    """How far a task is: a word for the program, a text for a person."""

    word: Literal["starting", "waiting", "working", "done", "stopped", "failed", "crashed"]
    text: str
    done: int = 0
    of: int = 0
    alive: bool = False


@dataclass(frozen=True)
class Suggestion:
    """A caption as it is and as it would be; the image is named from the data set's folder on."""

    image: str
    before: str
    after: str


class Task(WorkFolder):
    """The files of one task."""

    work = "worked on"

    def __init__(self, path: Path) -> None:
        super().__init__(path, "captioner.log")
        self.results = path / "results.jsonl"
        self._settings = path / "settings.json"

    def settings(self) -> Settings:
        """What is asked for.  Raises `UserError` for a folder that is none of a task."""
        try:
            return parse(json.loads(self._settings.read_bytes()))
        except (OSError, ValueError):
            raise UserError(f"{self.path}: not a captioning task (it has no settings.json that can be read)") from None

    def suggestions(self, start: int = 0) -> list[Suggestion]:
        """What was written so far, from the `start`-th on; a torn last line is not there yet."""
        rows = [row for row in EventReader(self.results).read() if row["kind"] == "caption"]
        return [Suggestion(row["image"], row["before"], row["after"]) for row in rows[start:]]

    def skipped(self) -> list[dict[str, str]]:
        """Images that got no caption, with the reason."""
        return [{"file": row["file"], "reason": row["reason"]} for row in EventReader(self.events).read()
                if row["kind"] == "skipped"]

    def state(self) -> State:
        """What it is doing: is the lock held, and what was said last?"""
        last, held = self.look(lambda: last_event(self.events))
        if last is None:
            return State("starting", "starting", alive=held)
        done, of = last.get("done", 0), last.get("of", 0)
        if held and last["kind"] == "waiting":
            return State("waiting", "waiting for the GPU, which another run is using", alive=True)
        if held:
            text = f"{done} of {of} images" if of else last.get("name", "starting")
            return State("working" if of else "starting", text, done, of, alive=True)
        if last["kind"] != "end":
            return State("crashed", f"ended without a word; {self.log} may say why. What it wrote so far is kept",
                         done, of)
        if last["reason"] == "error":
            return State("failed", last["error"], done, of)
        return State(last["reason"], f"{last['reason']}: {done} of {of} images", done, of)


def parse(values: Mapping[str, Any]) -> Settings:
    """Checked settings; `UserError` with one line a fault."""
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(f"{problem.where}: {problem.text}"
                                  for problem in preset.found_in(SECTION, Settings, error))) from None


def create(workspace: Path, settings: Settings) -> Task:
    """The folder of a new task, numbered on: workspace/captioning/0001.  Paths are written out whole."""
    root = workspace / "captioning"
    root.mkdir(parents=True, exist_ok=True)
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
    model = Path(settings.model).expanduser()
    settings = settings.model_copy(update={"folder": str(Path(settings.folder).expanduser().resolve()),
                                           "model": str(model.resolve()) if model.exists() else settings.model})
    write_atomic(task._settings, settings.model_dump_json(indent=2).encode())
    return task


def list_tasks(workspace: Path) -> list[Task]:
    """All tasks of a workspace, the newest first."""
    return [Task(path.parent) for path in sorted((workspace / "captioning").glob("*/settings.json"), reverse=True)
            if path.parent.name.isdigit()]
