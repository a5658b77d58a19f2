"""Decodes the bytes of any common image file to upright 8-bit sRGB, or says in plain words why it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image, ImageCms

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 180_000_000  # a 13,400² scan; decoded it takes about 0.7 GB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow warns above this and refuses above twice this: one limit, ours
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
UNSUPPORTED = {".heic", ".heif", ".jxl", ".psd", ".svg"}  # images to a person, but nothing here reads them

# EXIF tag 0x0112 to the transposition that makes the image upright (EXIF 2.3, table 4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_SRGB = ImageCms.createProfile("sRGB")


class ImageError(Exception):
    """Why one image cannot be trained on, as words that follow its name; the run goes on without it."""


def inspect(data: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from its header; raises `ImageError` for what shows there.

    Pixels are decoded only where the header leaves a doubt: 5,000 photographs would take minutes.
    """
    with _plain_words():
        _open(data).verify()  # PNG: every chunk's checksum
        image = _open(data)
        width, height = image.size
        if _orientation(image, data) >= 5:
            width, height = height, width
        if image.format in ("JPEG", "MPO") and b"\xff\xd9" not in data[-65536:]:  # no end marker: cut off?
            image.load()
    return width, height


def decode(data: bytes, at_least: int = 0) -> Image.Image:
    """The image upright, RGB, 8 bits, sRGB, transparency over white, the first frame of several.

    With `at_least` (pixels) a JPEG may come out at a half, a quarter or an eighth of its size, both sides no shorter
    than that, in a fraction of the time: for thumbnails.  Raises `ImageError`.
    """
    return _upright(data, _flatten, at_least)


def decode_mask(data: bytes) -> Image.Image:
    """A drawn mask as 8-bit grey, upright, transparent parts black.  Raises `ImageError`."""
    return _upright(data, _grey_over_black)


def decode_alpha(data: bytes) -> Image.Image:
    """How opaque an image is, as 8-bit grey, upright.  Raises `ImageError`."""
    return _upright(data, lambda image: _rgba(image).getchannel("A"))


def has_alpha(data: bytes) -> bool:
    """Whether an image that `inspect` took can be transparent, from its header."""
    image = _open(data)
    return image.mode in _TRANSPARENT or "transparency" in image.info


def unreadable_type(name: str) -> str:
    """Why a file of that name is not read although people call it an image; "" for all others."""
    suffix = os.path.splitext(name)[1].lower()
    return f"{suffix[1:].upper()} files are not read; save it as PNG or JPEG" if suffix in UNSUPPORTED else ""


def _upright(data: bytes, convert: Callable[[Image.Image], Image.Image], at_least: int = 0) -> Image.Image:
    """What `convert` makes of an image, turned as its EXIF says."""
    with _plain_words():
        image = _open(data)
        orientation = _orientation(image, data)
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()
        converted = convert(image)
    return converted.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else converted


@contextmanager
def _plain_words() -> Iterator[None]:
    """Whatever a decoder raises, as `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("the file is empty")
    image = Image.open(BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} × {height} pixels are more than the {MAX_PIXELS // 10**6} million that "
                         "are read; make it smaller")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 when it cannot be told."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
    # A PNG may have its EXIF behind the pixels, and Pillow decodes all of it to look: only when there is any.
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"exif", b"tiff:Orientation")):
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - a broken EXIF block is no reason to lose the image
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    image = _eight_bits(image)
    profile = image.info.get("icc_profile")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        rgba = _rgba(image)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba).convert("RGB")
    elif image.mode not in ("RGB", "CMYK"):
        image = image.convert("RGB")
    return (_to_srgb(image, profile) if profile else image).convert("RGB")


def _grey_over_black(image: Image.Image) -> Image.Image:
    rgba = _rgba(_eight_bits(image))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("L")


def _rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    import numpy as np  # late: such images are rare, and a process that decodes others starts twice as fast

    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        return _from_unit(np.asarray(image) / 65535.0)
    return _from_unit(np.asarray(image))  # floating TIFF, 0..1


def _from_unit(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255.0).clip(0, 255).round().astype("uint8"))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours of another space (Display P3, Adobe RGB, a press's CMYK) as sRGB; unchanged when that fails."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that can be read (broken, or another type than its name says)"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {MAX_PIXELS // 10**6} million pixels that are read; make it smaller"
    return f"broken: {str(error).strip() or type(error).__name__}"
