"""Chooses the size that each image is trained at, and where it is cropped."""

from __future__ import annotations

import hashlib
import math
import random
from functools import lru_cache
from typing import Literal

Size = tuple[int, int]  # width, height

FINEST = {"sd15": 8, "sdxl": 8, "flux1": 16, "flux2": 16}  # pixels of a latent, or of a token, by family
MAX_SIDE = 2  # times the resolution: shapes beyond 4:1 are cropped to 4:1


def step_for(resolution: int, finest: int) -> int:
    """What both sides must be a multiple of: 64, and less for small pictures, down to the model's finest grid."""
    return max(finest, min(64, resolution // (8 * finest) * finest))


def size_for(width: int, height: int, resolution: int, *, buckets: bool, step: int) -> Size:
    """The size an image of `width` × `height` pixels is trained at; both sides are multiples of `step`.

    With buckets: for each side the longest other side that keeps the area at most resolution²; of these sizes
    the one of the nearest aspect ratio.  Without: the largest square.  Small images are enlarged to the same
    area: a size of their own would put them into buckets of one, and a batch of those is one image repeated.
    """
    if not buckets:
        side = max(step, resolution // step * step)
        return side, side
    ratio = math.log(width / height)
    return min(_bucket_list(resolution, step), key=lambda size: (abs(math.log(size[0] / size[1]) - ratio),
                                                                 -size[0] * size[1], size))


def cover(width: int, height: int, size: Size) -> Size:
    """The size an image is resized to, aspect ratio kept, so that it just covers `size`."""
    scale = max(size[0] / width, size[1] / height)
    return max(size[0], round(width * scale)), max(size[1], round(height * scale))


def crop_offsets(width: int, height: int, size: Size, *, crop: Literal["center", "random"], variants: int,
                 sha256: str, seed: int) -> list[tuple[int, int]]:
    """`variants` crops (left, top) of the covering image, in its pixels: all the centre, or random ones.

    Random ones are distinct as far as there is room (then they repeat in turn), and a function of the image's
    content, the size and the seed.
    """
    full = cover(width, height, size)
    room_x, room_y = full[0] - size[0], full[1] - size[1]
    if crop == "center":
        return [(room_x // 2, room_y // 2)] * variants
    rng = random.Random(hashlib.blake2b(f"{seed}:{sha256}:{size}".encode(), digest_size=8).digest())
    wanted = min(variants, (room_x + 1) * (room_y + 1))
    found: dict[tuple[int, int], None] = {}
    while len(found) < wanted:
        found[rng.randint(0, room_x), rng.randint(0, room_y)] = None
    offsets = list(found)
    return [offsets[i % wanted] for i in range(variants)]


@lru_cache(maxsize=16)
def _bucket_list(resolution: int, step: int) -> tuple[Size, ...]:
    """Every (w, h) with h the largest multiple of step that keeps the area within resolution²; and (h, w)."""
    side = max(step, resolution // step * step)
    sizes = {(side, side)}  # where step does not divide the resolution, the rule alone finds no square
    for width in range(step, MAX_SIDE * resolution + 1, step):
        height = resolution * resolution // width // step * step
        if step <= height <= MAX_SIDE * resolution:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))
