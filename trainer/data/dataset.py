"""Finds the images and captions of a data set and reads their pixels; the files are only ever read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer import captions
from trainer.data import images
from trainer.data.buckets import Size, cover
from trainer.data.decoding import READERS, Picture, Wanted
from trainer.data.folders import find_images, mask_of, walk
from trainer.data.images import ImageError
from trainer.errors import UserError

Masks = Literal["off", "file", "alpha", "auto"]  # where masks come from; auto: a file, else the alpha channel
SAME_SHAPE = 0.02  # by how much a mask's aspect ratio may differ from its image's: both may have been rounded


@dataclass(frozen=True)
class Mask:
    """Where an image's mask is, a file of its own or the image itself (its alpha), and sha256 of that file's bytes."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Item:
    """One image with its caption: size in pixels after EXIF rotation, sha256 of the file's bytes.

    `prior` marks a regularisation image.
    """

    path: Path
    caption: str
    repeats: int
    width: int
    height: int
    sha256: str
    mask: Mask | None = None
    prior: bool = False


@dataclass(frozen=True)
class Skipped:
    """A file that looks like an image and is not trained on, with the reason in plain words."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Dataset:
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]
    excluded: int = 0  # images that the data set's own lists leave out


def scan(folders: Sequence[Path], *, repeats: int = 1, setting: str = "data.folder", masks: Masks = "off",
         progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Every image in the folders and their sub-folders, in the order of its path.

    A folder "N_name" gives its images N repeats (the nearest such folder counts), times `repeats`.  Hidden
    files, masks and excluded images are passed over; a broken image is skipped with its reason; equal ones
    are kept.  `setting` names the folders in messages.  Raises `UserError` for a missing or empty folder,
    nothing readable, captions that are not UTF-8, and masks that cannot be used (all of them at once).
    """
    found = [entry for folder in folders for entry in find_images(Path(folder), setting)]
    items: list[Item] = []
    skipped: list[Skipped] = []
    faults: list[str] = []
    pool = ThreadPoolExecutor(READERS)
    try:
        results = pool.map(partial(_inspect, masks=masks), [path for path, _ in found])
        for done, ((path, own), result) in enumerate(zip(found, results), 1):
            if isinstance(result, str):
                skipped.append(Skipped(path, result))
            elif own == 0:
                skipped.append(Skipped(path, "its folder's name says 0 repeats"))
            elif isinstance(result, UserError):
                faults.append(str(result))
            else:
                items.append(replace(result, repeats=own * repeats))
            if progress:
                progress(done, len(found))
    finally:
        pool.shutdown(cancel_futures=True)
    if faults:
        raise UserError("\n".join(faults))
    if not items:
        listed = "\n".join(f"  {entry.file}: {entry.reason}" for entry in skipped[:10])
        raise UserError(f"{setting}: none of the {len(skipped)} images in {_names(folders)} can be used:\n{listed}")
    there = sum(1 for folder in folders for _ in walk(Path(folder), setting))
    return Dataset(tuple(items), tuple(skipped), there - len(found))


def split(items: Sequence[Item], share: float, seed: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Items to train on and items held out: about `share` of them, at least one, chosen by content and seed.

    Equal images stay on one side; names and order do not matter.  Raises `UserError` when none is left.
    """
    distinct = sorted({item.sha256 for item in items},
                      key=lambda sha: hashlib.blake2b(f"{seed}:{sha}".encode(), digest_size=16).digest())
    count = max(1, round(share * len(distinct)))
    if count >= len(distinct):
        raise UserError(f"evaluate.holdout: of {len(distinct)} different images none would be left to train "
                        "on; add images, or set it to 0")
    held = set(distinct[:count])
    return (tuple(item for item in items if item.sha256 not in held),
            tuple(item for item in items if item.sha256 in held))


def wanted(item: Item, size: Size) -> Wanted:
    """An item as decoders take it."""
    return Wanted(item.path, item.sha256, item.width * item.height, size)


def crop_picture(picture: Picture, size: Size, offset: tuple[int, int], flip: bool) -> np.ndarray:
    """A crop of a covering image, mirrored after cropping if `flip`.  # h w 3, uint8"""
    (width, height), (left, top) = size, offset  # in pixels of the covering image (`buckets.cover`)
    pixels = np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3)
    crop = pixels[top:top + height, left:left + width]
    return crop[:, ::-1] if flip else crop


def to_unit(pixels: Tensor) -> Tensor:
    """Bytes b h w 3 as float32 in [-1, 1], b 3 h w, with the same bits on every device."""
    half = torch.full((), 127.5, device=pixels.device)  # by a plain number a GPU divides inexactly
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / half - 1.0


def mask_image(item: Item, size: Size) -> Image.Image:
    """The mask of an image, 8-bit grey, resized as `cover_image` resizes the image, each pixel the mean of its area.

    Raises `UserError` when it is broken, or not the one that was hashed.
    """
    mask = item.mask
    assert mask is not None
    try:
        data = mask.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != mask.sha256:
            raise ImageError("changed since the data set was read; start again to train on what it is now")
        grey = images.decode_alpha(data) if mask.path == item.path else images.decode_mask(data)
    except (OSError, ImageError) as error:
        raise UserError(f"{mask.path}: the mask cannot be used: {error}") from None
    return grey.resize(cover(item.width, item.height, size), Image.Resampling.BOX)


def crop_grey(image: Image.Image, size: Size, offset: tuple[int, int]) -> Tensor:
    """A crop of a covering mask.  # h w, float32 in [0, 1]"""
    (width, height), (left, top) = size, offset
    return torch.from_numpy(np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255.0)


def _inspect(path: Path, masks: Masks) -> Item | UserError | str:
    """What one image is (its repeats left at 1); or why it is skipped; or what is wrong beside it."""
    if reason := images.unreadable_type(path.name):
        return reason
    try:
        data = path.read_bytes()
        width, height = images.inspect(data)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageError as error:
        return str(error)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        mask = _find_mask(path, width / height, masks)
        if mask is None and masks in ("alpha", "auto") and images.has_alpha(data):
            mask = Mask(path, sha256)
        return Item(path, captions.read(captions.sidecar(path)), 1, width, height, sha256, mask)
    except UserError as error:
        return error


def _find_mask(path: Path, ratio: float, masks: Masks) -> Mask | None:
    """The mask file beside an image of that aspect ratio, if there is one and it is wanted."""
    file = mask_of(path)
    if masks not in ("file", "auto") or not file.exists():
        return None
    try:
        data = file.read_bytes()
        width, height = images.inspect(data)
    except (OSError, ImageError) as error:
        raise UserError(f"{file}: the mask cannot be used: {error}; draw it again, or delete it") from None
    if abs(width / height / ratio - 1) > SAME_SHAPE:
        raise UserError(f"{file}: the mask has {width} × {height} pixels, which is another shape than its image; draw "
                        "it again, or delete it")
    return Mask(file, hashlib.sha256(data).hexdigest())


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)
