"""Small data sets on the disk, opened as the app opens them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from app.datasets.data_set import DataSet


def draw(path: Path, size: tuple[int, int] = (32, 24), seed: int = 0, caption: str | None = None, mode: str = "RGB",
         **options: object) -> Path:
    """An image of smooth random colours, another one for each seed; its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption.encode())
    return path


def image_hashes(*folders: Path) -> list[str]:
    """Of all images below the folders, wherever they are (the trash, too); sorted."""
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in folder.rglob("*")
                  if path.is_file() and path.suffix.lower() in (".png", ".jpg", ".webp", ".gif", ".tif", ".heic"))


def tree(root: Path) -> dict[str, bytes]:
    """All files but those of the journal and the trash; a draft that is put in place meanwhile is none."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and ".studio" not in path.parts:
            with suppress(FileNotFoundError):
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def wait_until_known(data_set: DataSet, seconds: float = 60.0) -> None:
    """Until all images were looked at."""
    wait_for(lambda: data_set.index.known() == len(data_set.index.records), seconds)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def card(data_set, name):
    """What the page is told of one image."""
    return data_set.list_images(names=[name])["cards"][0]
