"""Pictures small enough to stand inside a page, as data."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

MOST_BYTES = 4_000_000  # of all pictures of a page
SIDES = ((320, 82), (256, 80), (192, 76), (128, 70))  # longest side in pixels, quality: tried in this order


class Picture(NamedTuple):
    """What stands in a page."""

    path: Path
    alt: str
    caption: str


def figures(groups: Sequence[tuple[str, Sequence[Picture]]], most: int = MOST_BYTES) -> tuple[str, int]:
    """Groups of pictures, each under its heading, as HTML; and how many had to stay away to keep below `most` bytes.

    All have one size, the largest that fits; if even the smallest does not, the last groups are left out.
    """
    for side, quality in SIDES:
        made = [(heading, [(picture, _small(picture.path, side, quality)) for picture in group])
                for heading, group in groups]
        if sum(len(data) for _, group in made for _, data in group) <= most:
            break
    taken, shown, left_out = 0, [], 0
    for heading, group in made:
        taken += sum(len(data) for _, data in group)
        known = [(picture, data) for picture, data in group if data]
        if taken > most:
            left_out += len(known)
        elif known:
            shown.append(f'<h3>{escape(heading)}</h3><div class="shots">{"".join(map(_figure, known))}</div>')
    return "".join(shown), left_out


def _figure(shown: tuple[Picture, str]) -> str:
    picture, data = shown
    return (f'<figure><img src="data:image/webp;base64,{data}" alt="{escape(picture.alt)}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>")


def _small(path: Path, side: int, quality: int) -> str:
    """The picture as base64 of a WebP without metadata; "" for one that cannot be read."""
    from PIL import Image  # late: only a report with pictures needs it

    out = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((side, side))
            picture.convert("RGB").save(out, "WEBP", quality=quality)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return base64.b64encode(out.getvalue()).decode()
