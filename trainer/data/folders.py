"""Finds the images of a data set's folders, with their repeats, and which of them are left out of training."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.images import SUFFIXES, UNSUPPORTED
from trainer.errors import UserError

# Three digits at most: "2024_summer" is a year and not two thousand repeats.
REPEATS = re.compile(r"(\d{1,3})_")
MASK = "-masklabel.png"  # behind the stem of an image's name
EXCLUDED = ".excluded"  # beside the images: the names of those not to train on, one a line


def find_images(folder: Path, setting: str = "data.folder") -> list[tuple[Path, int]]:
    """The images to train on in a folder and its sub-folders, in the order of their paths, with their repeats.

    A folder "N_name" gives its images N repeats (the nearest such folder counts).  Hidden files, masks, and what
    `.excluded` names are passed over.  `setting` names the folder in messages.  Raises `UserError` for a folder that
    is missing or has no images, and for one in which all are excluded.
    """
    if not folder.is_dir():
        state = "a file, not a folder" if folder.exists() else "not there"
        raise UserError(f"{setting}: {folder} is {state}; give the folder with the images")
    found = sorted(walk(folder, setting), key=lambda entry: entry[0].relative_to(folder).as_posix())
    if not found:
        raise UserError(f"{setting}: no images in {folder} or its sub-folders "
                        f"(known types: {', '.join(sorted(suffix[1:] for suffix in SUFFIXES))})")
    excluded = {parent: excluded_in(parent) for parent in {path.parent for path, _ in found}}
    kept = [(path, repeats) for path, repeats in found if path.name not in excluded[path.parent]]
    if not kept:
        raise UserError(f"{setting}: all {len(found)} images in {folder} are excluded; include some in the data set "
                        f"tab, or delete the files called {EXCLUDED}")
    return kept


def walk(folder: Path, setting: str = "data.folder") -> Iterator[tuple[Path, int]]:
    """Every image in a folder and its sub-folders, excluded or not, with its repeats, in no order."""

    def fail(error: OSError) -> None:
        raise UserError(f"{setting}: {error.filename} cannot be read: {error.strerror}")

    inherited = {os.fspath(folder): repeats_of(folder.resolve().name, 1)}
    seen = {os.path.realpath(folder)}  # a link to a folder above would lead round for ever
    for parent, names, files in os.walk(folder, onerror=fail, followlinks=True):
        kept = []
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                inherited[path] = repeats_of(name, inherited[parent])
                kept.append(name)
        names[:] = kept
        for name in files:
            if is_image(name):
                yield Path(parent, name), inherited[parent]


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, readable here or not; a mask is none."""
    known = os.path.splitext(name)[1].lower() in SUFFIXES | UNSUPPORTED
    return known and not name.startswith(".") and not is_mask(name)


def is_mask(name: str) -> bool:
    return name.lower().endswith(MASK)


def mask_of(image: Path) -> Path:
    """Where the mask of an image stands."""
    return image.with_name(image.stem + MASK)


def repeats_of(name: str, inherited: int) -> int:
    """How often a folder of that name shows its images: "5_cats" five times."""
    match = REPEATS.match(name)
    return int(match.group(1)) if match else inherited


def excluded_in(folder: Path) -> frozenset[str]:
    """Names of the images in `folder` itself that are not to be trained on.  Raises `UserError` if it cannot tell."""
    path = folder / EXCLUDED
    try:
        return parse_excluded(path.read_bytes())
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise UserError(f"{path}: the list of excluded images cannot be read: {error.strerror}; delete it to include "
                        "all images") from None


def parse_excluded(data: bytes) -> frozenset[str]:
    """The names in a list's bytes, whatever editor has written it."""
    lines = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").split("\n")
    return frozenset(name for line in lines if (name := line.removesuffix("\r")))


def format_excluded(names: Iterable[str]) -> bytes | None:
    """The list's bytes; None, no file, for no names."""
    return "".join(f"{name}\n" for name in sorted(names)).encode("utf-8", "surrogateescape") or None
