"""Masks at the size of latents, cut as their images are: made once, kept in the cache, handed out by the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.buckets import Size
from trainer.data.cache import Cache
from trainer.data.dataset import crop_grey, mask_image
from trainer.data.order import Draw
from trainer.data.store import LatentStore, Progress, Shelf

FORMAT = 1  # of the entries: raise it when what is stored, or how it is made, changes
MEMORY = 256 << 20  # bytes kept in memory: a mask of 128 × 128 places takes 64 kB


class MaskStore:
    """The masks of a store's images, where they have any."""

    def __init__(self, latents: LatentStore) -> None:
        self.latents = latents
        self.masked = frozenset(i for i, item in enumerate(latents.items) if item.mask)
        self._shelf = Shelf(latents.cache, MEMORY)
        self._grids: dict[Size, tuple[int, int]] = {}  # size in pixels -> rows and columns of its latents

    def fill(self, progress: Progress, guard: Callable[[], None]) -> None:
        """Make what is missing; the latents must be there already.  Raises `UserError` for a mask that is broken."""
        wanted = [i for i in self.latents.readable() if i in self.masked]
        for done, item in enumerate(wanted):
            keys = {self._key(item, offset): offset for offset in self.latents.offsets[item]}
            absent = {key: offset for key, offset in keys.items() if not self.latents.cache.has(key)}
            if absent:
                guard()
                progress(done, len(wanted))
                size = self.latents.sizes[item]
                image = mask_image(self.latents.items[item], size)
                for key, offset in absent.items():
                    mask = crop_grey(image, size, offset)  # h w
                    self.latents.cache.put(key, {"mask": F.adaptive_avg_pool2d(mask[None], self._grid(item))})

    def masks(self, draws: Sequence[Draw], device: torch.device | str) -> Tensor | None:
        """How much of each place of the latents is masked in, 0 to 1; 1 for images without a mask.  # b 1 h w

        None when no image of the batch has one.
        """
        if not any(draw.item in self.masked for draw in draws):
            return None
        return torch.stack([self._mask(draw) for draw in draws]).to(device)

    def _mask(self, draw: Draw) -> Tensor:
        if draw.item not in self.masked:
            return torch.ones(1, *self._grid(draw.item))
        mask = self._shelf.get(self._key(draw.item, self.latents.offsets[draw.item][draw.crop]))["mask"]  # 1 h w
        return mask.flip(-1) if draw.flip else mask  # as `crop_picture` does: cut first, then mirrored

    def _grid(self, item: int) -> tuple[int, int]:
        size = self.latents.sizes[item]
        if size not in self._grids:
            plain = Draw(item, item, crop=0, flip=False, caption=0)
            rows, columns = self.latents.latents([plain], "cpu").shape[-2:]
            self._grids[size] = rows, columns
        return self._grids[size]

    def _key(self, item: int, offset: tuple[int, int]) -> str:
        mask, own = self.latents.items[item].mask, self.latents.items[item].path
        assert mask is not None
        return Cache.key("mask", FORMAT, mask.sha256, mask.path == own, *self.latents.sizes[item], *offset,
                         *self._grid(item))
