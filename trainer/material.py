"""What a run trains and is measured on: images, captions, buckets and order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer import captions
from trainer.data import buckets, dataset
from trainer.data.cache import Cache
from trainer.data.dataset import Item, Skipped
from trainer.data.order import Draw, Order, stream
from trainer.data.store import LatentStore
from trainer.schema import Data, Preset

Progress = Callable[[int, int], None]


class Material:
    """The images of a run (`train`, and `held` out) and the prompts for them; nothing is encoded yet."""

    def __init__(self, preset: Preset, bucket_step: int, progress: Progress | None = None) -> None:
        self.preset = preset
        folders = [preset.data.folder] if isinstance(preset.data.folder, str) else preset.data.folder
        found = dataset.scan([Path(folder) for folder in folders], repeats=preset.data.repeats, progress=progress)
        self.skipped = list(found.skipped)
        self.train, self.held = list(found.items), []
        if preset.evaluate.folder:
            held = dataset.scan([Path(preset.evaluate.folder)], setting="evaluate.folder", progress=progress)
            self.held, self.skipped = list(held.items), self.skipped + list(held.skipped)
        elif preset.evaluate.holdout > 0:
            train, kept = dataset.split(self.train, preset.evaluate.holdout, preset.train.seed)
            self.train, self.held = list(train), list(kept)
        self.bucket_step = bucket_step

    def skip(self, file: str, reason: str) -> None:
        """An image that turned out to be unreadable."""
        self.skipped.append(Skipped(file, reason))

    def fingerprint(self) -> str:
        """Changes when an image or a caption does: a resume then says so."""
        facts = "\n".join(f"{item.sha256} {item.repeats} {item.caption}" for item in self.train)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def size(self, item: Item) -> tuple[int, int]:
        """Width and height in pixels that an image is trained at."""
        data = self.preset.data
        return buckets.size_for(item.width, item.height, data.resolution, buckets=data.buckets, step=self.bucket_step)

    def train_captions(self, item: Item) -> list[str]:
        """The captions an image is trained with: one, or several orders of its tags."""
        data = self.preset.data
        return captions.variants(item.caption, trigger=data.trigger, shuffle_tags=data.shuffle_tags,
                                 keep_tags=data.keep_tags, count=data.caption_variants if data.shuffle_tags else 1,
                                 seed=self.preset.train.seed)

    def held_caption(self, item: Item) -> str:
        """A held-out image's caption, as it stands, with the trigger word."""
        return captions.variants(item.caption, trigger=self.preset.data.trigger, shuffle_tags=False, keep_tags=0,
                                 count=1, seed=0)[0]

    def latent_store(self, items: Sequence[Item], cache: Cache, model_id: str, dtype: torch.dtype, *,
                     training: bool) -> LatentStore:
        """Where the latents of `items` are kept: all crops and flips for training, the plain middle otherwise."""
        data = self.preset.data
        crop, variants = (data.crop, data.crop_variants if data.crop == "random" else 1) if training else ("center", 1)
        sizes = [self.size(item) for item in items]
        offsets = [buckets.crop_offsets(item.width, item.height, size, crop=crop, variants=variants, sha256=item.sha256,
                                        seed=self.preset.train.seed) for item, size in zip(items, sizes)]
        return LatentStore(items, sizes, offsets, training and data.flip, cache, model_id, dtype)

    def order(self, store: LatentStore, global_batch: int) -> Order:
        """Which samples make up each step; images that could not be read are left out."""
        data: Data = self.preset.data
        return Order(store.sizes, store.repeats(), global_batch=global_batch,
                     seed=self.preset.train.seed, crop_variants=data.crop_variants if data.crop == "random" else 1,
                     flip=data.flip, caption_variants=data.caption_variants if data.shuffle_tags else 1,
                     caption_dropout=data.caption_dropout)

    def prompts(self) -> list[str]:
        """Every text that the run will need: all captions, sample prompts, the negative and the empty one."""
        texts = [text for item in self.train for text in self.train_captions(item)]
        texts += [self.held_caption(item) for item in self.held]
        texts += [*self.preset.sample.prompts, self.preset.sample.negative, ""]
        return list(dict.fromkeys(texts))


def plain_draw(item: int) -> Draw:
    """An item as it is: middle crop, not mirrored, first caption."""
    return Draw(item=item, index=item, crop=0, flip=False, caption=0)


def framing(store: LatentStore, draws: Sequence[Draw]) -> Tensor:
    """How each draw's picture lies in its image, for SDXL: original height and width, the crop's top and left, target
    height and width (b 6, fp32); the crop as it lies in the resized, and mirrored, image."""
    rows = []
    for draw in draws:
        item, size = store.items[draw.item], store.sizes[draw.item]
        left, top = store.offsets[draw.item][draw.crop]
        if draw.flip:
            left = buckets.cover(item.width, item.height, size)[0] - size[0] - left
        rows.append([item.height, item.width, top, left, size[1], size[0]])
    return torch.tensor(rows, dtype=torch.float32)


def noise_seeds(draws: Sequence[Draw], seed: int) -> list[int]:
    """One seed a sample, for its noise and timestep."""
    return [stream(seed, draw.index, "noise") for draw in draws]


def to_device(conditioning: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings on their way to the model."""
    return {name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in conditioning.items()}
