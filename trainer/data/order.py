"""Says which images a step trains on, and how: everything is a function of (seed, global sample index)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.buckets import Size
from trainer.errors import UserError


def stream(seed: int, index: int, purpose: str) -> int:
    """A 63-bit seed of its own for each (seed, index, purpose), to give to a generator."""
    digest = hashlib.blake2b(f"{seed}:{index}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: image, global sample index, crop, mirrored or not, and caption."""

    item: int
    index: int
    crop: int
    flip: bool
    caption: int  # variant; -1 is dropped: the empty prompt


class Order:
    """The data order of a run, without any state: `batch(step)` can be asked for in any sequence.

    An epoch shows each image at least `repeats` times.  A batch is of one size; the last batch of a size is
    filled from the start of that epoch's order, so that no image is dropped.  Repeats of 0 leave one out.

    Items marked `prior` (regularisation images) make up about `prior_share` of an epoch's samples: every epoch takes
    the next so many of each size, of an endless shuffled row of them, so that all come up in turn.
    """

    def __init__(self, sizes: Sequence[Size], repeats: Sequence[int], *, global_batch: int, seed: int,
                 crop_variants: int, flip: bool, caption_variants: int, caption_dropout: float,
                 prior: Sequence[bool] = (), prior_share: float = 0.0) -> None:
        if len(sizes) != len(repeats) or global_batch < 1:
            raise ValueError(f"{len(sizes)} sizes, {len(repeats)} repeats, batches of {global_batch}")
        self.global_batch, self.seed, self.flip = global_batch, seed, flip
        self.crop_variants, self.caption_variants = crop_variants, caption_variants
        self.caption_dropout = caption_dropout
        self.buckets: dict[Size, list[int]] = {}  # size -> items, as often as they are repeated
        self.prior: dict[Size, list[int]] = {}
        for item, (size, count) in enumerate(zip(sizes, repeats)):
            if count:
                pool = self.prior if any(prior[item:item + 1]) else self.buckets
                pool.setdefault(size, []).extend([item] * count)
        if not self.buckets:
            raise UserError("data.folder: no image is left to train on")
        self._quota = self._quotas(prior_share)
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        counts = (len(self.buckets.get(size, ())) + self._quota.get(size, 0) for size in self._sizes)
        return sum(-(-count // self.global_batch) for count in counts)

    def batch(self, step: int) -> list[Draw]:
        """The global batch of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = step * self.global_batch
        return [self._draw(item, first + i) for i, item in enumerate(self._epoch(epoch)[position])]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch; only the last one asked for is kept."""
        if self._plan[0] != epoch:
            batches: list[list[int]] = []
            for size in self._sizes:
                members = [*self.buckets.get(size, ()), *self._prior_of(size, epoch)]
                random.Random(stream(self.seed, epoch, f"bucket {size}")).shuffle(members)
                for start in range(0, len(members), self.global_batch):
                    places = range(start, start + self.global_batch)
                    batches.append([members[i % len(members)] for i in places])
            random.Random(stream(self.seed, epoch, "batches")).shuffle(batches)
            self._plan = epoch, batches
        return self._plan[1]

    @property
    def _sizes(self) -> list[Size]:
        return sorted({*self.buckets, *self.prior})

    def _quotas(self, share: float) -> dict[Size, int]:
        """How many prior samples of each size an epoch takes: its part of the share, and one at least."""
        trained = sum(len(members) for members in self.buckets.values())
        all_prior = sum(len(members) for members in self.prior.values())
        return {size: max(1, round(share / (1 - share) * trained * len(members) / all_prior))
                for size, members in self.prior.items()}

    def _prior_of(self, size: Size, epoch: int) -> list[int]:
        members, count = self.prior.get(size, []), self._quota.get(size, 0)
        taken: list[int] = []
        for place in range(epoch * count, (epoch + 1) * count):
            cycle, position = divmod(place, len(members))
            if not taken or position == 0:
                row = list(members)
                random.Random(stream(self.seed, cycle, f"prior {size}")).shuffle(row)
            taken.append(row[position])
        return taken

    def _draw(self, item: int, index: int) -> Draw:
        dropped = stream(self.seed, index, "dropout") < self.caption_dropout * 2**63
        return Draw(item, index,
                    crop=stream(self.seed, index, "crop") % self.crop_variants,
                    flip=self.flip and stream(self.seed, index, "flip") % 2 == 1,
                    caption=-1 if dropped else stream(self.seed, index, "caption") % self.caption_variants)


def share(draws: Sequence[Draw], rank: int, processes: int, micro: int, grad_accum: int) -> list[Draw]:
    """What process `rank` trains on in micro batch `micro`; together the slices are the global batch."""
    size, rest = divmod(len(draws), processes * grad_accum)
    if rest:
        raise ValueError(f"a batch of {len(draws)} cannot be shared by {processes} processes × {grad_accum}")
    start = (micro * processes + rank) * size
    return list(draws[start:start + size])
