"""A tagger of the WD14 kind: model.onnx with its selected_tags.csv, through onnxruntime on the CPU."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from trainer.caption import wording
from trainer.captions import join_tags
from trainer.errors import UserError, first_line

MODEL, TAGS = "model.onnx", "selected_tags.csv"
GENERAL, CHARACTER = "0", "4"  # categories of tags; 9 is the rating, which is no part of a caption
SIDE = 448  # of the square that such a model sees, where it does not say so itself
EMOTICON = re.compile(r"[^A-Za-z0-9]*[A-Za-z0-9]?[^A-Za-z0-9]*_[^A-Za-z0-9]*[A-Za-z0-9]?[^A-Za-z0-9]*")  # ^_^  o_o


def is_tagger(folder: Path) -> bool:
    return (folder / MODEL).is_file()


class Tagger:
    """Tags of images, characters first, each kind by falling probability."""

    tags = True

    def __init__(self, folder: Path, *, threshold: float, character_threshold: float, blacklist: Sequence[str],
                 underscores: bool) -> None:
        """Raises `UserError` for a folder that lacks a file, or holds two that do not belong together."""
        self.limits = {GENERAL: threshold, CHARACTER: character_threshold}
        self.blacklist, self.underscores = blacklist, underscores
        self.names = _read_tags(folder / TAGS)
        try:
            self._session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - onnxruntime's own classes derive from Exception
            raise UserError(f"{folder / MODEL}: cannot be loaded: {first_line(error)}") from error
        self._input = self._session.get_inputs()[0]
        if len(self._input.shape) != 4 or self._input.shape[3] != 3:
            raise UserError(f"{folder / MODEL}: takes {self._input.shape}, not images of 3 channels, which come last; "
                            "it is no tagger of the WD14 kind")
        self._side = self._input.shape[1] if isinstance(self._input.shape[1], int) else SIDE
        outputs = self._session.get_outputs()[0].shape[-1]
        if isinstance(outputs, int) and outputs != len(self.names):
            raise UserError(f"{folder}: {MODEL} knows {outputs} tags, and {TAGS} lists {len(self.names)}; take both "
                            "files from one model")

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """The tags of each RGB image, parted by commas."""
        batch = np.stack([self._pixels(image) for image in images])  # b h w 3
        step = self._input.shape[0] if isinstance(self._input.shape[0], int) else len(batch)  # a batch baked in
        padded = np.concatenate([batch, *[batch[:1]] * (-len(batch) % step)])
        rows = [row for start in range(0, len(padded), step)
                for row in self._session.run(None, {self._input.name: padded[start:start + step]})[0]]
        return [join_tags(self._chosen(row)) for row in rows[:len(images)]]

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """On a white square, blue first, 0 to 255: as these models were trained.  # h w 3, float32"""
        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        square = square.resize((self._side, self._side), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[:, :, ::-1])

    def _chosen(self, probabilities: np.ndarray) -> list[str]:
        found = [(category != CHARACTER, -float(share), name)
                 for (name, category), share in zip(self.names, probabilities)
                 if category in self.limits and share >= self.limits[category]]
        return [self._spelled(name) for name in wording.without([name for *_, name in sorted(found)], self.blacklist)]

    def _spelled(self, name: str) -> str:
        return name if self.underscores or EMOTICON.fullmatch(name) else name.replace("_", " ")


def _read_tags(path: Path) -> list[tuple[str, str]]:
    """Name and category of each tag, in the order of the model's outputs."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return [(row["name"], row["category"].strip()) for row in rows]
    except FileNotFoundError:
        raise UserError(f"{path.parent}: there is a {MODEL} but no {TAGS}; download both files of the tagger") from None
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: not a list of tags with the columns name and category "
                        f"({type(error).__name__}: {error})") from None
