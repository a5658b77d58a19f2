"""The verb `bases`: which base models other programs have on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.bases import Found, Index
from trainer.detached import HOME
from trainer.errors import UserError
from trainer.model_folders import EXTRA_PATHS, Place, places_in, usual_places
from trainer.shell import Verbs, as_json, table


def add_verb(verbs: Verbs) -> None:
    help = "base models that ComfyUI, A1111, Forge, OneTrainer and the Hugging Face cache have here"
    bases = verbs.add_parser("bases", help=help, description=f"{help}. Nothing but headers is read.")
    bases.add_argument("folders", metavar="DIR", type=Path, nargs="*",
                       help="look here: a program's folder, or one with models (default: those beside this project and "
                            f"at home); ComfyUI's {EXTRA_PATHS} is followed")
    bases.add_argument("--json", action="store_true", help="the same facts as JSON")
    bases.set_defaults(work=show)


def show(options: argparse.Namespace) -> str:
    """Each base: family, size, whether it is ready or what is missing, and where it is."""
    places = places_of(options.folders) if options.folders else usual_places([HOME.parent, Path.home()])
    found = Index().find(places)
    if options.json:
        return as_json([one.as_dict() for one in found])
    looked = "\n".join(f"  {place.folder}" for place in places) or "  (none of the usual folders is here)"
    if not found:
        return f"no base model was found in\n{looked}\nGive a folder: python -m trainer bases DIR"
    rows = [["family", "name", "size", "", "model.base"],
            *([one.family or "–", one.name, f"{one.bytes / 1e9:.1f} GB", _ready(one), one.base] for one in found)]
    said = [line for one in found for line in _said(one)]
    return "\n".join([table(rows), *(["", *said] if said else [])])


def places_of(folders: list[Path]) -> list[Place]:
    """What is to be looked through of folders that a person gave. Raises `UserError` for one that is not there."""
    for folder in folders:
        if not folder.expanduser().is_dir():
            raise UserError(f"{folder} is not a folder; give one that holds base models, such as ComfyUI's")
    return [place for folder in folders for place in places_in(folder.expanduser().resolve())]


def _ready(one: Found) -> str:
    return "ready" if one.is_ready else "not for training here" if not one.family else "a part is missing"


def _said(one: Found) -> list[str]:
    """Parts that go with a base, and what is to be known of it."""
    lines = [f"  model.{setting} = {path}" for setting, path in one.parts.items()]
    lines += [f"  missing: {what}" for what in one.missing] + ([f"  {one.note}"] if one.note else [])
    return [f"{one.name}:", *lines] if lines else []
