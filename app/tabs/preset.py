"""The tab "Preset": choose one, change it by form or as text, save it, start a run with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from app import form
from app.components import Answer, PresetEditor, Request, server_function
from app.datasets.library import Library
from app.jobs import Jobs
from app.paths import Places, inside
from trainer import preset
from trainer.errors import UserError
from trainer.queue import Queue
from trainer.run import check_name, free_name

SHELVES = ("shipped", "own")
PICKED = ("data.folder", "evaluate.folder")  # settings for which a data set can be chosen
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,79}")
LONGEST = 200_000

Text = Annotated[str, Field(max_length=LONGEST)]
PresetName = Annotated[str, Field(max_length=200)]


class Nothing(Request):
    pass


class OpenPreset(Request):
    shelf: Literal["shipped", "own"]
    name: PresetName


class Change(Request):
    section: Annotated[str, Field(max_length=40)]
    key: Annotated[str, Field(max_length=40)]
    value: Annotated[str, Field(max_length=LONGEST)] | bool


class CheckPreset(Request):
    text: Text
    name: PresetName
    change: Change | None = None


class SavePreset(Request):
    text: Text
    name: PresetName
    shelf: Literal["shipped", "own"]  # where the text came from
    replace: bool = False


class StartRun(Request):
    text: Text
    name: PresetName
    shelf: Literal["shipped", "own"]
    run: Annotated[str, Field(max_length=200)]


def build(jobs: Jobs, library: Library) -> None:
    """Lay the tab out."""
    places = jobs.places
    fields = [field | {"picks": f"{field['section']}.{field['key']}" in PICKED} for field in form.describe()]
    PresetEditor(
        [server_function("list_sets", Nothing, lambda asked: library.list_sets()),
         server_function("list_presets", Nothing, lambda asked: list_presets(places)),
         server_function("open_preset", OpenPreset, lambda asked: open_preset(places, asked)),
         server_function("check_preset", CheckPreset, check_preset),
         server_function("save_preset", SavePreset, lambda asked: save_preset(places, asked)),
         server_function("start_run", StartRun, lambda asked: start_run(jobs, asked))],
        data={"form": fields}, elem_id="preset")


def list_presets(places: Places) -> Answer:
    """The names on both shelves."""
    return {shelf: sorted((path.stem for path in _shelf(places, shelf).glob("*.toml")), key=str.lower)
            for shelf in SHELVES}


def open_preset(places: Places, asked: OpenPreset) -> Answer:
    """A preset's text with its values and faults, and a free name for a run of it."""
    file = find(places, asked.shelf, asked.name)
    text = preset.read_text(file)
    return {"text": text, "run": free_name(places.workspace, file.stem, Queue(places.workspace).names()),
            **form.state_of(text, file.name)}


def check_preset(asked: CheckPreset) -> Answer:
    """A text's values and faults, after one change by the form."""
    text = asked.text
    if asked.change:
        text = form.change(text, asked.change.section, asked.change.key, asked.change.value)
    answer: Answer = form.state_of(text, f"{asked.name or 'preset'}.toml")
    return answer | {"text": text} if asked.change else answer


def save_preset(places: Places, asked: SavePreset) -> Answer:
    """Write a preset into the workspace; one that is there is replaced only when that was asked for."""
    if not FILE.fullmatch(asked.name):
        raise UserError("a preset's name has letters, digits, '_', '-' and blanks, at most 80 of them")
    check_name(asked.name)
    file = inside(places.presets, f"{asked.name}.toml")
    if file.exists() and not asked.replace:
        return {"exists": True}
    text = form.settled(asked.text, _shelf(places, asked.shelf)) if asked.shelf != "own" else asked.text
    preset.save(file, text)
    return {"text": text, **form.state_of(text, file.name)}


def start_run(jobs: Jobs, asked: StartRun) -> Answer:
    """Start a run of the text, or let it wait: of its file when it says the same, else of a draft."""
    jobs.refuse_taken(asked.run)
    preset.parse(asked.text, f"{asked.name or 'preset'}.toml")
    return {"run": asked.run, "waits": jobs.start(_file_of(jobs.places, asked), asked.run)}


def _file_of(places: Places, asked: StartRun) -> Path:
    try:
        file = find(places, asked.shelf, asked.name)
        if preset.read_text(file) == asked.text:
            return file
    except UserError:
        pass  # it was written here, or its file is gone: the text is what counts
    draft = inside(places.drafts, f"{asked.run}.toml")
    preset.save(draft, form.settled(asked.text, _shelf(places, asked.shelf)))
    return draft


def find(places: Places, shelf: str, name: str) -> Path:
    """The file of a preset.  Raises `UserError` when there is none."""
    folder = _shelf(places, shelf)
    file = inside(folder, f"{name}.toml")
    if not file.is_file() or file.parent != folder.resolve():
        raise UserError(f"there is no preset {name[:100]!r} in {folder}")
    return file


def _shelf(places: Places, shelf: Any) -> Path:
    return preset.SHIPPED if shelf == "shipped" else places.presets
