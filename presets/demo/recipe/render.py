"""Stage 1: every emoji on white at 128 px, in four sizes, and the demo's concept and held-out sets."""

from __future__ import annotations

import io
import json
import os
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from recipe.sources import BASE_STYLES, CONCEPT, HELD_OUT, TARGET_STYLE, Drawing, caption, load_drawings

RESOLUTION = 128
# Longest side of the glyph. Resizing from the vector, rather than when training, keeps every size sharp.
GLYPH_SIZES = (118, 110, 124, 100)
_CANVAS = 384


def _rasterise(source: str | bytes) -> Image.Image:
    """The glyph alone, cropped to what is drawn, on white."""
    if isinstance(source, str):
        source = resvg_py.svg_to_bytes(svg_string=source, width=_CANVAS, height=_CANVAS, skip_system_fonts=True)
    glyph = Image.open(io.BytesIO(bytes(source))).convert("RGBA")
    visible = glyph.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    paper = Image.new("RGBA", glyph.size, "white")
    return Image.alpha_composite(paper, glyph).convert("RGB").crop(visible)


def render(source: str | bytes) -> np.ndarray:
    """One drawing in all sizes, centred on white: uint8 [sizes, 128, 128, 3]."""
    glyph = _rasterise(source)
    pictures = []
    for size in GLYPH_SIZES:
        scale = size / max(glyph.size)
        fitted = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
        picture.paste(fitted, [(RESOLUTION - side) // 2 for side in fitted.size])
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def _write_set(folder: Path, drawings: list[Drawing]) -> None:
    """Pictures at the first size, each with its caption in a .txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        name = drawing.label.replace(" ", "_")
        Image.fromarray(render(drawing.source)[0]).save(folder / f"{name}.png", optimize=True)
        text = caption(drawing.style, drawing.label, drawing.tags)
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def run(packages: Path, work: Path, limit: int | None) -> None:
    """Writes `images.npy` and `drawings.json` (base styles), `concept/` and `heldout/` (target style)."""
    target = {drawing.label: drawing for drawing in load_drawings(packages, TARGET_STYLE)}
    _write_set(work / "concept", [target[label] for label in CONCEPT])
    _write_set(work / "heldout", [target[label] for label in HELD_OUT])

    drawings = [drawing for style in BASE_STYLES for drawing in load_drawings(packages, style)[:limit]]
    shape = (len(drawings), len(GLYPH_SIZES), RESOLUTION, RESOLUTION, 3)
    images = np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    with Pool(os.cpu_count()) as pool:
        pictures = pool.imap(render, [drawing.source for drawing in drawings], chunksize=16)
        for number, picture in enumerate(pictures):
            images[number] = picture
    images.flush()
    rows = [[drawing.style, drawing.label, drawing.tags, drawing.group] for drawing in drawings]
    (work / "drawings.json").write_text(json.dumps(rows), encoding="utf-8")
    print(f"render: {len(rows)} drawings, {len(CONCEPT)} concept, {len(HELD_OUT)} held out", flush=True)


def load_rendered(work: Path) -> tuple[np.ndarray, list[Drawing]]:
    """What `run` wrote: uint8 [n, sizes, 128, 128, 3], and the drawings (without their source)."""
    rows = json.loads((work / "drawings.json").read_text(encoding="utf-8"))
    drawings = [Drawing(style, label, tuple(tags), group, b"") for style, label, tags, group in rows]
    return np.load(work / "images.npy", mmap_mode="r"), drawings


def load_set(folder: Path) -> np.ndarray:
    """The pictures of a concept or held-out folder: uint8 [n, 128, 128, 3]."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
