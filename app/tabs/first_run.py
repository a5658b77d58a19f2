"""The five steps from the first start to a LoRA of one's own: how far somebody is, and a preset for their pictures."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from app import cards, form, shelves
from app.components import Answer, FirstRun, Request, server_function
from app.datasets.data_set import DataSet
from app.datasets.library import Library
from app.jobs import Jobs
from app.paths import Places
from app.tabs.dataset_requests import OfSet
from app.tabs.dataset_tools import list_trainings
from trainer import preset
from trainer.data import folders
from trainer.run import Run, is_name

MOST_LOOKED_AT = 2000  # images that are looked at for one with a caption
MOST_PROMPTS = 4
LONGEST_PROMPT = 300
FEWEST_HELD_OUT = 5  # images below which none is kept out of training
DEMO = "demo"
BY_MEMORY = ((10, "sdxl_stiefel"), (0, "sd15_stella"))  # GiB of the largest GPU from which a preset is the one to take
NAMES = {"sdxl_stiefel": "SDXL (7 GB, fetched once at the start)",
         "sd15_stella": "Stable Diffusion 1.5 (2.7 GB, fetched once at the start)"}

_own: dict[Path, bool] = {}  # whether a run, whose preset never changes, was of one's own pictures


class Nothing(Request):
    pass


def build(jobs: Jobs, library: Library) -> None:
    """Lay the strip out."""
    FirstRun([server_function("read_steps", Nothing, lambda asked: read_steps(jobs)),
              server_function("prepare_preset", OfSet, lambda asked: prepare(jobs.places, library, asked.id))],
             elem_id="first-run")


def read_steps(jobs: Jobs) -> Answer:
    """Which of the steps are done, by what lies on the disk."""
    places = jobs.places
    rows = jobs.listing()
    own = [row for row in rows if _is_own(Run(places.runs / row.name))]
    found = [_look(path) for path in _sets(places)]
    done = [row.name for row in own if Run(places.runs / row.name).result.is_file()]
    return {"pictures": any(has for has, _ in found), "captions": any(has for _, has in found),
            "settings": bool(shelves.names(places)["own"] or own),
            "running": next((row.name for row in own if row.state.alive), ""), "trained": next(iter(done), ""),
            "made": any(places.exports.glob("*.safetensors")), "runs": len(rows)}


def _sets(places: Places) -> list[Path]:
    if not places.datasets.is_dir():
        return []
    return [path for path in places.datasets.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _look(folder: Path) -> tuple[bool, bool]:
    """Whether a data set has an image, and whether one of its first has a caption."""
    images = list(itertools.islice((path for path, _ in folders.walk(folder, "data set")), MOST_LOOKED_AT))
    return bool(images), any(_has_text(path.with_suffix(".txt")) for path in images)


def _has_text(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _is_own(run: Run) -> bool:
    """Whether it is not the demo."""
    if run.path not in _own:
        try:
            values = form.values_of(run.preset.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError):
            return False  # it has no folder yet
        given = values.get("data", {}).get("folder", "")
        _own[run.path] = (given[0] if isinstance(given, list) else given) != str(preset.SHIPPED / "demo" / "concept")
    return _own[run.path]


def prepare(places: Places, library: Library, id: str) -> Answer:
    """A preset of one's own for a data set: the one that there is already, else a shipped one that fits this machine.

    Raises `UserError` for a data set without images.
    """
    data_set = library.open(id)
    info = data_set.info()
    images = info["images"] - info["excluded"]
    if not images:
        return {"error": f"{data_set.root.name} has no images yet; add some first"}
    if using := list_trainings(library, data_set)["using"]:
        return {"shelf": "own", "name": using, "said": f"This is your preset for {data_set.root.name}."}
    shipped, said = choose(cards.cards())
    text = form.settled(preset.read_text(shelves.find(places, "shipped", shipped)), preset.SHIPPED)
    name = _free(places, data_set.root.name)
    shelves.save(places, name, fitted(text, data_set, images), "own")
    return {"shelf": "own", "name": name, "said": said}


def choose(found: list[dict[str, Any]]) -> tuple[str, str]:
    """The shipped preset to begin with on a machine with these GPUs, and why, in words."""
    if not found:
        return DEMO, ("No NVIDIA graphics card was found, so this trains on the demo's small base model: 128 × 128 "
                      "pixels, about two minutes. It shows the whole way; real models need a graphics card.")
    gib = max(card["gib"] or 0 for card in found)
    name = next(name for least, name in BY_MEMORY if gib >= least)
    return name, (f"All is set for {NAMES[name]}. For another base model choose another preset, "
                  "and your data set under Images.")


def fitted(text: str, data_set: DataSet, images: int) -> str:
    """A shipped preset's text for a data set of one's own.

    Without captions the data set's name is the trigger word, since training needs some words to learn by.
    """
    values = form.values_of(text) or {}
    texts = [record.caption.strip() for record in data_set.records() if not record.excluded and record.caption.strip()]
    before = values.get("data", {}).get("trigger", "")
    trigger = "" if texts else _words(data_set.root.name)
    prompts = list(dict.fromkeys(one[:LONGEST_PROMPT].replace("\n", " ") for one in texts))[:MOST_PROMPTS]
    if trigger:
        old = [one.removeprefix(f"{before}, ") for one in values.get("sample", {}).get("prompts", [])]
        prompts = [trigger, *(f"{trigger}, {one}" for one in old[:MOST_PROMPTS - 1])]
    changes: dict[str, dict[str, Any]] = {
        "data": {"folder": data_set.root.as_posix(), "trigger": trigger or None}, "sample": {"prompts": prompts}}
    is_demo = bool(values.get("evaluate", {}).get("folder"))
    if is_demo:  # its held-out pictures are of its own style
        changes["data"] |= dict.fromkeys(("shuffle_tags", "keep_tags", "caption_variants"))
        changes["evaluate"] = {"folder": None, "distance": "off", "generate": None}
    if is_demo or images < FEWEST_HELD_OUT:
        changes.setdefault("evaluate", {})["holdout"] = 0.1 if images >= FEWEST_HELD_OUT else None
    return preset.update_text(_without_introduction(text), changes)


def _without_introduction(text: str) -> str:
    """The text without the comment at its head, which tells of the shipped preset."""
    lines = text.splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), 0)
    return "".join(lines[first:]).lstrip("\n")


def _words(name: str) -> str:
    """A trigger word of a data set's name: "My_Cat 2" is "my cat 2"."""
    return " ".join(re.findall(r"\w+", name.replace("_", " ").lower())) or "my style"


def _free(places: Places, name: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9 _-]+", "", name).strip(" _-")[:70].rstrip()
    stem = stem if is_name(stem) else "my pictures"
    taken = {one.lower() for shelf in shelves.names(places).values() for one in shelf}
    return next(one for number in itertools.count(1)
                if (one := stem if number == 1 else f"{stem}-{number}").lower() not in taken)
