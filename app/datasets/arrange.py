"""Works out which files go where when images are moved, excluded or given masks."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from app.datasets.changes import Change, Move, Write, content, place
from app.datasets.index import Record
from app.paths import inside
from trainer.data import folders
from trainer.errors import UserError
from trainer.run import RESERVED

LONGEST = 200, 40  # bytes of a name before and from its last dot on: systems take 255, and a number may come between
_FORBIDDEN = re.compile(r'[\\/:*?"<>|\x00-\x1f\x7f]')


def moves(chosen: Sequence[Record], everything: Sequence[Record], target: Callable[[str], str]) -> list[Change]:
    """Images with their masks and captions to other places; a caption or mask that another image needs, too, stays."""
    names = {record.name for record in chosen}
    needed = {name for record in everything if record.name not in names for name in (record.sidecar, record.mask_name)}
    found: dict[str, Change] = {}
    for record in chosen:
        found |= {name: Move(name, target(name)) for name in record.files() if name not in needed}
    return list(found.values())


def into_folder(root: Path, chosen: Sequence[Record], everything: Sequence[Record], folder: str) -> list[Change]:
    """Images into a folder of the data set; whether they are excluded goes along."""
    check_folder(root, folder)
    prefix = f"{folder}/" if folder else ""
    changes = moves(chosen, everything, lambda name: prefix + name.rpartition("/")[2])
    targets = Counter(change.to.casefold() for change in changes if isinstance(change, Move))
    if repeated := sorted(name for name, count in targets.items() if count > 1):
        raise UserError(f"two of the images would be called {repeated[0]}; rename one first")
    excluded = {record.name.rpartition("/")[2] for record in chosen if record.excluded}
    lists = [*exclusions(root, chosen, False), *relisted(root, {folder: excluded}, True)]
    return changes + lists


def exclusions(root: Path, chosen: Sequence[Record], excluded: bool) -> list[Change]:
    """The lists of excluded images, with these added or taken out."""
    by_folder: dict[str, set[str]] = {}
    for record in chosen:
        if record.excluded != excluded:
            by_folder.setdefault(record.folder, set()).add(record.name.rpartition("/")[2])
    return relisted(root, by_folder, excluded)


def into_trash(root: Path, chosen: Sequence[Record], everything: Sequence[Record], folder: str) -> list[Change]:
    """Images into a folder of the trash, where lists like those of the data set's folders tell which are excluded."""
    by_folder: dict[str, set[str]] = {}
    for record in chosen:
        if record.excluded:
            by_folder.setdefault(f"{folder}/{record.folder}".rstrip("/"), set()).add(record.name.rpartition("/")[2])
    return [*moves(chosen, everything, lambda name: f"{folder}/{name}"), *exclusions(root, chosen, False),
            *relisted(root, by_folder, True)]


def relisted(root: Path, by_folder: Mapping[str, Collection[str]], excluded: bool) -> list[Change]:
    """The folders' lists of excluded images, with these names added or taken out."""
    changes: list[Change] = []
    for folder, names in by_folder.items():
        name = list_of(folder)
        before = content(root, name)
        listed = folders.parse_excluded(before or b"")
        after = folders.format_excluded(listed.union(names) if excluded else listed.difference(names))
        if names:
            changes.append(Write(name, before, after))
    return changes


def list_of(folder: str) -> str:
    """The name of a folder's list of excluded images."""
    return f"{folder}/{folders.EXCLUDED}" if folder else folders.EXCLUDED


def check_folder(root: Path, folder: str) -> None:
    """Raises `UserError` for what cannot be a folder of a data set."""
    if folder and any(safe_name(part) != part for part in folder.split("/")):
        raise UserError(f"{folder[:100]!r} cannot be a folder's name; use letters, digits, blanks, '_' and '-'")
    if folder and place(root, folder).exists() and not inside(root, folder).is_dir():
        raise UserError(f"{folder} is a file and not a folder")


def safe_name(name: str) -> str:
    """A file's or folder's name that every system takes, as near as can be to the one given; "" if nothing is left."""
    name = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode()))
    name = name.strip().lstrip(".").rstrip(". ")
    end = len(name) - len(folders.MASK) if folders.is_mask(name) else len(os.path.splitext(name)[0])
    stem, ending = name[:end], name[end:]
    if stem.casefold().partition(".")[0] in RESERVED:
        stem += "_"
    return (_cut(stem, LONGEST[0]) + _cut(ending, LONGEST[1])).rstrip(". ")


def _cut(text: str, most: int) -> str:
    """As many of the first letters as have that many bytes."""
    return text.encode()[:most].decode(errors="ignore")


def free_stem(stem: str, suffixes: Collection[str], taken: Collection[str]) -> str:
    """The stem, or stem-2, -3…, with which none of the names is taken (casefolded)."""
    number, candidate = 1, stem
    while any((candidate + suffix).casefold() in taken for suffix in suffixes):
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


def check_mask(record: Record, png: bytes) -> None:
    """Raises `UserError` for what is no PNG of the upright image's size."""
    from PIL import Image

    try:
        with Image.open(BytesIO(png), formats=["PNG"]) as mask:
            mask.load()
            size = mask.size
    except Exception:  # noqa: BLE001 - decoders raise anything on broken bytes
        raise UserError(f"{record.name}: what was drawn is not a PNG picture; draw it again") from None
    facts = record.facts
    if facts and facts.width and size != (facts.width, facts.height):
        raise UserError(f"{record.name}: the mask has {size[0]} × {size[1]} pixels and the image "
                        f"{facts.width} × {facts.height}; they must be the same")
