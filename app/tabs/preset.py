"""The tab "Preset": choose one, change it by form or as text, see what it takes, save it, start a run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from app import cards, differences, form, shelves
from app.base_models import BaseModels
from app.checking import Checks
from app.components import Answer, PresetEditor, Request, server_function
from app.datasets.library import Library
from app.jobs import Jobs
from app.paths import Places, inside
from trainer import preset
from trainer.errors import UserError
from trainer.queue import Queue
from trainer.run import free_name

PICKED = ("data.folder", "evaluate.folder", "data.regularisation")  # settings for which a data set can be chosen
LONGEST = 200_000
BUSY = "Another run is being trained, and a check would take some of the GPU's memory from it."

Text = Annotated[str, Field(max_length=LONGEST)]
PresetName = Annotated[str, Field(max_length=200)]
Shelf = Literal["shipped", "own"]
Key = Annotated[str, Field(max_length=64)]


class Nothing(Request):
    pass


class OpenPreset(Request):
    shelf: Shelf
    name: PresetName


class Change(Request):
    section: Annotated[str, Field(max_length=40)]
    key: Annotated[str, Field(max_length=40)]
    value: Annotated[str, Field(max_length=LONGEST)] | bool | None = None  # None: as in the shipped preset


class CheckPreset(Request):
    text: Text
    name: PresetName
    shelf: Shelf = "own"
    reference: PresetName = ""  # the shipped preset to compare with; "": the nearest
    change: Change | None = None


class SavePreset(Request):
    text: Text
    name: PresetName
    shelf: Shelf  # where the text came from
    tag: Key = ""  # of the file that the page has
    replace: bool = False


class DeletePreset(Request):
    name: PresetName


class RestorePreset(Request):
    thrown: PresetName
    replace: bool = False


class StartCheck(Request):
    text: Text
    name: PresetName
    shelf: Shelf
    asked: bool = False  # by a person, who wants it now
    again: bool = False


class OneCheck(Request):
    key: Key


class UseBase(Request):
    text: Text
    base: Key


class StartRun(Request):
    text: Text
    name: PresetName
    shelf: Shelf
    run: Annotated[str, Field(max_length=200)]
    cards: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(max_length=64)] = []  # [] as the preset says
    queued: bool = False  # to wait in the queue, also when nothing is on


def build(jobs: Jobs, library: Library) -> None:
    """Lay the tab out."""
    places, bases = jobs.places, BaseModels(jobs.places)
    checks = Checks(places, jobs.trainer)
    fields = [field | {"picks": f"{field['section']}.{field['key']}" in PICKED} for field in form.describe()]
    PresetEditor(
        [server_function("list_sets", Nothing, lambda asked: library.list_sets()),
         server_function("list_presets", Nothing, lambda asked: shelves.names(places)),
         server_function("open_preset", OpenPreset, lambda asked: open_preset(places, asked)),
         server_function("check_preset", CheckPreset, lambda asked: check_preset(places, asked)),
         server_function("save_preset", SavePreset, lambda asked: save_preset(places, asked)),
         server_function("delete_preset", DeletePreset, lambda asked: {"thrown": shelves.delete(places, asked.name)}),
         server_function("restore_preset", RestorePreset,
                         lambda asked: shelves.restore(places, asked.thrown, asked.replace)._asdict()),
         server_function("list_bases", Nothing, lambda asked: bases.listing()),
         server_function("use_base", UseBase, lambda asked: use_base(bases, asked)),
         server_function("list_cards", Nothing, lambda asked: {"cards": cards.cards()}),
         server_function("start_check", StartCheck, lambda asked: start_check(jobs, checks, asked)),
         server_function("read_check", OneCheck, lambda asked: checks.read(asked.key)),
         server_function("stop_check", OneCheck, lambda asked: stop_check(checks, asked)),
         server_function("start_run", StartRun, lambda asked: start_run(jobs, asked))],
        data={"form": fields}, elem_id="preset")


def open_preset(places: Places, asked: OpenPreset) -> Answer:
    """A preset's text with its values, faults and differences, and a free name for a run of it."""
    file = shelves.find(places, asked.shelf, asked.name)
    text = preset.read_text(file)
    reference = asked.name if asked.shelf == "shipped" else ""
    return {"text": text, "tag": shelves.tag(text),
            "run": free_name(places.workspace, file.stem, Queue(places.workspace).names()),
            **_state(text, file.name, reference, file.parent)}


def check_preset(places: Places, asked: CheckPreset) -> Answer:
    """A text's values, faults and differences, after one change by the form."""
    text, folder = asked.text, shelves.folder_of(places, asked.shelf)
    if asked.change:
        section, key, value = asked.change.section, asked.change.key, asked.change.value
        text = (differences.take_back(text, section, key, asked.reference, folder) if value is None
                else form.change(text, section, key, value))
    answer = _state(text, f"{asked.name or 'preset'}.toml", asked.reference, folder)
    return answer | {"text": text} if asked.change else answer


def _state(text: str, name: str, reference: str, folder: Path) -> Answer:
    state = form.state_of(text, name)
    return state | differences.of(state["values"], reference, folder)


def save_preset(places: Places, asked: SavePreset) -> Answer:
    """Write a preset into the workspace; one that is there, or was changed meanwhile, is replaced only when asked."""
    try:
        saved = shelves.save(places, asked.name, asked.text, asked.shelf, asked.tag, asked.replace)
    except shelves.Changed as changed:
        return {"changed": str(changed)}
    if saved is None:
        return {"exists": True}
    return {**saved._asdict(), "tag": shelves.tag(saved.text),
            **_state(saved.text, f"{asked.name}.toml", "", places.presets)}


def use_base(bases: BaseModels, asked: UseBase) -> Answer:
    """The text with a base model of the list."""
    text, said = bases.take(asked.text, asked.base)
    return {"text": text, "said": said}


def start_check(jobs: Jobs, checks: Checks, asked: StartCheck) -> Answer:
    """Begin to look at a preset; unasked not while a run is trained."""
    if not asked.asked and any(row.state.alive for row in jobs.listing()):
        return {"held": BUSY}
    folder = shelves.folder_of(jobs.places, asked.shelf)
    return {"key": checks.begin(asked.text, asked.name, folder, asked.again)}


def stop_check(checks: Checks, asked: OneCheck) -> Answer:
    """Nobody waits for this one any more."""
    checks.stop(asked.key)
    return {}


def start_run(jobs: Jobs, asked: StartRun) -> Answer:
    """Start a run of the text, or let it wait: of its file when it says the same, else of a draft."""
    jobs.refuse_taken(asked.run)
    text = asked.text
    if chosen := sorted(set(asked.cards)):
        if missing := set(chosen) - {card["index"] for card in cards.cards()}:
            raise UserError(f"there is no GPU {min(missing)} here; reload the page")
        text = form.change(text, "memory", "device", f"cuda:{','.join(map(str, chosen))}")
    preset.parse(text, f"{asked.name or 'preset'}.toml")
    file = _file_of(jobs.places, asked.shelf, asked.name, text, asked.run)
    return {"run": asked.run, "waits": jobs.start(file, asked.run, asked.queued)}


def _file_of(places: Places, shelf: str, name: str, text: str, run: str) -> Path:
    try:
        file = shelves.find(places, shelf, name)
        if preset.read_text(file) == text:
            return file
    except UserError:
        pass  # it was written here, or its file is gone: the text is what counts
    draft = inside(places.drafts, f"{run}.toml")
    preset.save(draft, form.settled(text, shelves.folder_of(places, shelf)))
    return draft
