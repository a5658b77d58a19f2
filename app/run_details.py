"""Tells the page of one run what its events do not: pictures of its hardest images, a spectrum, notes, checkpoints."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.columns import as_dict, as_list, number, short, step_of
from app.datasets.library import Library
from app.datasets.thumbnails import SOON
from app.hardest import Hard, Hardest
from app.paths import inside
from trainer import notes, preset
from trainer.data.folders import is_image
from trainer.errors import UserError
from trainer.events import Event, EventReader, rewind
from trainer.run import Run
from trainer.schema import Preset

Answer = dict[str, Any]


class RunDetails:
    """What is asked for when somebody looks at it, and not with every poll."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._hardest = Hardest()

    def hard(self, run: Run, most: int) -> Answer:
        """The hardest images with their small pictures, and the data sets of the app in which they lie."""
        images, harder, measured = self._hardest.of(run, most)
        sets = {folder: self._library.id_of(folder) for folder in _data_folders(run)} if images else {}
        return {"images": [self._row(image, sets) for image in images], "harder": harder, "measured": measured}

    def _row(self, image: Hard, sets: dict[Path, str]) -> dict[str, Any]:
        """One image; `set` is "" where it cannot be opened, `thumb` None where it may not be shown either."""
        folder, name = next(((folder, name) for folder in sets if (name := _name_in(folder, image.file))), (None, ""))
        set_id = sets[folder] if folder else ""
        thumb = self._thumb(folder, name) if folder and (set_id or _is_shipped(folder)) else None
        return {"file": name or image.file, "times": image.times, "ratio": image.ratio, "course": image.course,
                "thumb": thumb, "set": set_id}

    def _thumb(self, folder: Path, name: str) -> str:
        """Where the small picture of an image stands; "" while it is being made."""
        try:
            path = inside(folder, name)
            facts = path.stat()
        except (OSError, UserError):  # it was deleted since, or leads elsewhere
            return ""
        stamp = (facts.st_mtime_ns, facts.st_size)
        target = self._library.workshop.file_of(path, stamp)
        if target.is_file():
            return target.as_posix()
        if is_image(path.name):
            self._library.workshop.want(path, stamp, lambda facts: None, SOON)
        return ""


def spectrum(run: Run, block: str, step: int) -> Answer:
    """The singular values of a block at the measurement nearest to a step, beside those of the first one.

    Raises `UserError` when nothing was measured of that block.
    """
    events = [event for event in rewind(EventReader(run.events, kinds=("rank", "start")).read())
              if block in as_dict(event.get("spectrum"))]
    if not events:
        raise UserError(f"no spectrum was measured of {block[:100]!r} in this run")
    chosen = min(events, key=lambda event: abs(step_of(event) - step))
    erank, stable, norm = (as_list(as_dict(chosen.get("blocks")).get(block)) + [None] * 3)[:3]
    return {"block": block, "step": step_of(chosen), "values": _values(chosen, block), "rank": chosen.get("rank"),
            "erank": short(number(erank)), "stable": short(number(stable)), "norm": short(number(norm)),
            "first": {"step": step_of(events[0]), "values": _values(events[0], block)}}


def beside(run: Run, seen: str) -> Answer:
    """The notes and the checkpoints that are there, when the page has others; their tag in any case."""
    steps = [[step, run.is_pinned(step)] for step in run.checkpoint_steps()]
    text = notes.read(run)
    tag = hashlib.sha256(repr((steps, text)).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    if tag == seen:
        return {}
    return {"seen": tag, "checkpoints": steps, "own_notes": text, "notes_tag": notes_tag(text)}


def save_notes(run: Run, text: str, before: str) -> Answer:
    """Write the notes if nobody else changed them since; else nothing is written and theirs come back."""
    theirs = notes.read(run)
    if notes_tag(theirs) != before and theirs != text:
        return {"saved": False, "own_notes": theirs, "notes_tag": notes_tag(theirs)}
    if theirs != text:
        notes.write(run, text)
    return {"saved": True, "notes_tag": notes_tag(notes.read(run))}


def notes_tag(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def prompts(run: Run) -> list[str]:
    """The prompts that samples are drawn for."""
    known = _preset(run)
    return list(known.sample.prompts) if known else []


def _preset(run: Run) -> Preset | None:
    with suppress(UserError):
        return preset.load(run.preset)
    return None


def _data_folders(run: Run) -> list[Path]:
    known = _preset(run)
    folders = known.data.folder if known else []
    return [Path(folder) for folder in ([folders] if isinstance(folders, str) else folders) if folder]


def _is_shipped(folder: Path) -> bool:
    """Whether a folder came with the app, as the demo's images did: everybody may see those."""
    with suppress(OSError, RuntimeError):  # a loop of links
        return preset.SHIPPED in folder.resolve().parents
    return False


def _name_in(folder: Path, file: str) -> str:
    """The name of a file in its data set; "" when it lies elsewhere."""
    path = Path(file)
    if not path.is_absolute():
        path = folder / path
    try:
        name = path.relative_to(folder).as_posix()
    except ValueError:
        return ""
    return "" if ".." in name.split("/") else name


def _values(event: Event, block: str) -> list[float | None]:
    return [short(number(value)) for value in as_list(event["spectrum"][block])[:64]]
