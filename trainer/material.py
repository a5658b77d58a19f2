"""What a run trains and is measured on: images, captions, buckets and order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer import captions
from trainer.data import buckets, dataset
from trainer.data.cache import Cache
from trainer.data.dataset import Item, Skipped
from trainer.data.order import Draw, Order, stream
from trainer.data.store import LatentStore
from trainer.errors import UserError
from trainer.schema import Data, Preset

FEWEST_HELD = 4  # images that distances are measured to
Progress = Callable[[int, int], None]


class Material:
    """The images of a run (`train`, `prior` for regularisation, and `held` out) and the prompts for them.

    Nothing is encoded yet.  `remarks` are what a person should know of the data set.
    """

    def __init__(self, preset: Preset, bucket_step: int, progress: Progress | None = None) -> None:
        self.preset, data = preset, preset.data
        scan = partial(dataset.scan, masks=data.masks, progress=progress)
        found = scan(_paths(data.folder), repeats=data.repeats)
        self.skipped = list(found.skipped)
        self.train, self.held, self.prior = list(found.items), [], []
        if data.regularisation:
            prior = scan(_paths(data.regularisation), setting="data.regularisation")
            self.prior = [replace(item, prior=True) for item in prior.items]
            self.skipped += prior.skipped
        self.remarks = self._remarks(found.excluded)
        if preset.evaluate.folder:
            held = scan([Path(preset.evaluate.folder)], setting="evaluate.folder")
            self.held, self.skipped = list(held.items), self.skipped + list(held.skipped)
        elif preset.evaluate.holdout > 0:
            train, kept = dataset.split(self.train, preset.evaluate.holdout, preset.train.seed)
            self.train, self.held = list(train), list(kept)
        self._leave_out_held()
        if 0 < len(self.held) < FEWEST_HELD and preset.evaluate.distance != "off":
            self.remarks.append(f"KID and FID are not measured: they need {FEWEST_HELD} held-out images or more, and "
                                f"there are {len(self.held)}")
        self.bucket_step = bucket_step

    def _leave_out_held(self) -> None:
        """Train on no image that is held out, be it in a folder within data.folder, or a copy."""
        held = {item.sha256 for item in self.held}
        both = [item for item in self.train if item.sha256 in held]
        if not both:
            return
        self.train = [item for item in self.train if item.sha256 not in held]
        if not self.train:
            raise UserError(f"evaluate.folder: every image of data.folder is in {self.preset.evaluate.folder} too"
                            ", so that none would be left to train on; hold out fewer, or use evaluate.holdout instead")
        self.remarks.append(f"held out, so not trained on though they lie among the images to train on: {len(both)}, "
                            f"such as {both[0].path.name}")

    def _remarks(self, excluded: int) -> list[str]:
        masked = sum(item.mask is not None for item in self.train)
        remarks = [f"excluded in the data set: {excluded} of {excluded + len(self.train)} images"] if excluded else []
        remarks += [f"with a mask: {masked} of {len(self.train)} images; outside of it the loss weighs "
                    f"{self.preset.data.mask_background:g}"] if masked else []
        remarks += [f"regularisation images: {len(self.prior)}, about {self.preset.data.regularisation_share:.0%} of "
                    "the samples"] if self.prior else []
        return remarks

    @property
    def trained(self) -> list[Item]:
        """Every image that steps are made of, regularisation behind the others."""
        return self.train + self.prior

    def skip(self, file: str, reason: str) -> None:
        """An image that turned out to be unreadable."""
        self.skipped.append(Skipped(file, reason))

    def fingerprint(self) -> str:
        """Changes when an image or a caption does: a resume then says so."""
        facts = "\n".join(f"{item.sha256} {item.repeats} {item.caption}" + (" prior" if item.prior else "")
                          + (f" {item.mask.sha256}" if item.mask else "") for item in self.trained)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def size(self, item: Item) -> tuple[int, int]:
        """Width and height in pixels that an image is trained at."""
        data = self.preset.data
        return buckets.size_for(item.width, item.height, data.resolution, buckets=data.buckets, step=self.bucket_step)

    def train_captions(self, item: Item) -> list[str]:
        """The captions an image is trained with: one, or several orders of its tags.

        Regularisation images get no trigger word: they show what it does not mean.
        """
        data = self.preset.data
        trigger = "" if item.prior else data.trigger
        return captions.variants(item.caption, trigger=trigger, shuffle_tags=data.shuffle_tags,
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
                     caption_dropout=data.caption_dropout, prior=[item.prior for item in store.items],
                     prior_share=data.regularisation_share)

    def loss_weights(self, store: LatentStore, draws: Sequence[Draw]) -> list[float] | None:
        """The weight of each sample's loss; None when all are alike."""
        weight = self.preset.data.regularisation_weight
        weights = [weight if store.items[draw.item].prior else 1.0 for draw in draws]
        return weights if set(weights) != {1.0} else None

    def prompts(self) -> list[str]:
        """Every text that the run will need: all captions, sample prompts, the negative and the empty one."""
        texts = [text for item in self.trained for text in self.train_captions(item)]
        texts += [self.held_caption(item) for item in self.held]
        texts += [*self.preset.sample.prompts, self.preset.sample.negative, ""]
        return list(dict.fromkeys(texts))


def _paths(folders: str | Sequence[str]) -> list[Path]:
    return [Path(folder) for folder in ([folders] if isinstance(folders, str) else folders)]


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
