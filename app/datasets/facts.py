"""Looks at one image in a process of its own: what the health check asks of it, and its thumbnail.

`python -m app.datasets.facts` answers each line of JSON with one: decoding thousands of photographs shall neither stop
the app nor fill its memory, and a file that kills a decoder shall not kill the app.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

SIDE = 320  # pixels, the longer side of a thumbnail
LARGE = 1280  # of the view in which masks are drawn
QUALITY = 80  # of WebP
PATCH = 8  # pixels, the side of the tiny picture that near-duplicates are confirmed with
_HASHED = 32  # pixels, the side of what the perceptual hash is made of


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an image's pixels; with `trouble` (why it cannot be used) all else is unknown."""

    width: int = 0  # upright
    height: int = 0
    sha256: str = ""
    hash: str = ""  # 64 bits as hex, near for images that look alike
    patch: str = ""  # PATCH x PATCH RGB as base64
    alpha: bool = False
    turned: bool = False  # by its EXIF data
    cmyk: bool = False
    deep: bool = False  # more than 8 bits a channel
    trouble: str = ""
    passing: bool = False  # the trouble may be gone at another time: it is not kept over restarts


def look(path: Path, thumbnail: Path, side: int = SIDE) -> Facts:
    """The facts of an image; writes its thumbnail, in sRGB and upright."""
    from trainer.data import images
    from trainer.files import write_atomic

    try:
        if reason := images.unreadable_type(path.name):
            return Facts(trouble=reason)
        data = path.read_bytes()
        width, height = images.inspect(data)
        picture = images.decode(data, at_least=side)
    except OSError as error:
        return Facts(trouble=f"cannot be read: {error.strerror}", passing=True)
    except images.ImageError as error:
        return Facts(trouble=str(error))
    picture.thumbnail((side, side))
    packed = BytesIO()
    picture.save(packed, "WEBP", quality=QUALITY, method=2)
    write_atomic(thumbnail, packed.getvalue())
    return Facts(width, height, hashlib.sha256(data).hexdigest(), perceptual_hash(picture), _patch(picture),
                 **_header(data))


def perceptual_hash(picture: Any) -> str:
    """64 signs of the lowest cosine frequencies of the grey picture (pHash), as hex.  `picture` is a PIL image."""
    import numpy as np

    grey = np.asarray(picture.convert("L").resize((_HASHED, _HASHED)), dtype=np.float64)
    k, n = np.arange(PATCH + 1)[:, None], np.arange(_HASHED)[None, :]
    cosines = np.cos(np.pi * k * (2 * n + 1) / (2 * _HASHED))  # 9 32
    low = (cosines @ grey @ cosines.T)[1:, 1:].ravel()  # 64, without the two axes' means
    return f"{int(''.join('1' if value > np.median(low) else '0' for value in low), 2):016x}"


def _patch(picture: Any) -> str:
    return base64.b64encode(picture.resize((PATCH, PATCH)).tobytes()).decode()


def _header(data: bytes) -> dict[str, bool]:
    """What stands in the header of a file that was just decoded."""
    from PIL import Image

    with Image.open(BytesIO(data)) as image:
        has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        if image.format == "PNG":  # may tell its EXIF data behind the pixels; few PNGs have any
            turned = b"eXIf" in data and image.getexif().get(0x0112, 1) > 1
        else:
            turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) > 1
        # A PNG of 16-bit colours is opened as 8-bit: its header's 25th byte tells
        is_deep = image.mode.startswith(("I", "F")) or (image.format == "PNG" and data[24] == 16)
        return {"alpha": has_alpha, "turned": turned, "cmyk": image.mode == "CMYK", "deep": is_deep}


def serve() -> None:
    """Answer requests until there are no more."""
    if hasattr(os, "nice"):
        os.nice(10)  # behind the app, and behind training
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = asdict(look(Path(asked["path"]), Path(asked["thumbnail"]), asked["side"]))
        except OSError as error:  # the thumbnail could not be written, which says nothing of the image
            answer = {"failed": str(error)}
        except Exception as error:  # noqa: BLE001 - decoders raise anything, and the next image must have its turn
            answer = asdict(Facts(trouble=f"broken: {error or type(error).__name__}"))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
