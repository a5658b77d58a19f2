"""What an encoder is given of one image."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.buckets import Size
from trainer.data.dataset import Item, crop_picture
from trainer.data.decoding import cover_image, picture_of
from trainer.data.store import upload


def load_pixels(item: Item, size: Size, offset: tuple[int, int], flip: bool) -> Tensor:
    """One crop, decoded by this process.  # 3 h w, float32 in [-1, 1]"""
    picture = picture_of(cover_image(item.path, item.sha256, size))
    return upload([crop_picture(picture, size, offset, flip)], torch.device("cpu"))[0]
