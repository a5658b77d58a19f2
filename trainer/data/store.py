"""Latents and prompt embeddings of a data set: encoded once, kept in the cache, handed out by the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from trainer.data.buckets import Size
from trainer.data.cache import Cache
from trainer.data.dataset import READERS, Item, cover_image, crop_pixels
from trainer.data.images import ImageError
from trainer.data.order import Draw
from trainer.distributed import ALONE, World
from trainer.errors import UserError

FORMAT = 1  # of the entries: raise it when what is stored, or how pixels are made, changes
MEMORY = 2 << 30  # bytes a store keeps in memory; what is beyond is read from the disk each time
UNWRITTEN = 64  # entries that may wait for the disk
PIXELS = 2 * 512 * 512  # that go through an encoder together: in fp32 a VAE takes about 2 GiB for them

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One crop of one image that is to be encoded, and its key in the cache."""

    key: str
    item: int
    offset: tuple[int, int]
    flip: bool


@dataclass(frozen=True)
class TextJob:
    key: str
    text: str


J = TypeVar("J", Job, TextJob)


@dataclass(frozen=True)
class Batch(Generic[J]):
    """Jobs that are encoded together, and the keys of those that the cache lacks."""

    jobs: list[J]
    absent: frozenset[str]


class Shelf:
    """Entries of a cache, the first ones read kept in memory."""

    def __init__(self, cache: Cache, limit: int) -> None:
        self.cache, self.room = cache, limit
        self._kept: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor]:
        if key in self._kept:
            return self._kept[key]
        entry = self.cache.get(key)
        if entry is None:
            raise UserError(f"the cache in {self.cache.root} lost an entry while training (was it emptied?); "
                            "resume the run, and it is made again")
        size = sum(tensor.numel() * tensor.element_size() for tensor in entry.values())
        if size <= self.room:
            self.room -= size
            self._kept[key] = entry
        return entry


class Writer:
    """Puts entries into a cache behind the encoder's back, so that it does not wait for the disk."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.thread = cache, ThreadPoolExecutor(1, "cache")
        self.waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for all entries; what went wrong with one is raised, unless something else is."""
        self.thread.shutdown()
        while kind is None and self.waiting:
            self.waiting.popleft().result()

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors soon; raises what went wrong with an earlier entry."""
        self.waiting.append(self.thread.submit(self.cache.put, key, tensors))
        if len(self.waiting) > UNWRITTEN:
            self.waiting.popleft().result()


class LatentStore:
    """Latents of every crop (and its mirror: the latent of a mirrored image is not the mirrored latent).

    `sizes` and `offsets` are one per item, as `buckets` gives them; `model_id` names the VAE by content.
    """

    def __init__(self, items: Sequence[Item], sizes: Sequence[Size],
                 offsets: Sequence[Sequence[tuple[int, int]]], flips: bool, cache: Cache, model_id: str,
                 dtype: torch.dtype, memory: int = MEMORY) -> None:
        self.items, self.sizes, self.offsets, self.flips = items, sizes, offsets, flips
        self.cache, self.model_id, self.dtype = cache, model_id, dtype
        self.broken: set[str] = set()  # sha256 of images found broken while decoding
        self._shelf = Shelf(cache, memory)

    def missing(self) -> list[Job]:
        """What is not in the cache yet."""
        return [job for batch in self._batches(1) for job in batch if not self.cache.has(job.key)]

    def readable(self) -> list[int]:
        """Positions of the items that are not broken, as far as is known."""
        return [i for i, item in enumerate(self.items) if item.sha256 not in self.broken]

    def repeats(self) -> list[int]:
        """The items' repeats for `Order`; 0 for those found broken."""
        return [0 if item.sha256 in self.broken else item.repeats for item in self.items]

    def fill(self, encode: Callable[[Tensor], Tensor], batch_size: int, progress: Progress,
             should_stop: Callable[[], bool], on_skip: Callable[[str, str], None], world: World = ALONE) -> bool:
        """Encode what is missing, at most `batch_size` images at a time; False when `should_stop` ended it early.

        Each process of `world` does its part, all into the one cache.

        `encode` takes pixels in [-1, 1]  # b 3 h w  and gives latents  # b c h' w'.  An image that breaks
        while decoding is told to `on_skip(file, reason)` and left out.  Raises `UserError` when all are.
        """
        batches, done, total = _todo(self.cache, world.part(list(self._batches(batch_size))))
        progress(done, total)
        with Writer(self.cache) as writer:
            for batch, (jobs, pixels) in zip(batches, self._decoded(batches, on_skip)):
                if should_stop():
                    return False
                latents = encode(torch.stack(pixels)).to("cpu", self.dtype) if pixels else ()  # b c h w
                for job, latent in zip(jobs, latents):
                    if job.key in batch.absent:
                        writer.put(job.key, {"latents": latent})
                done += len(batch.absent)
                progress(done, total)
        self.broken.update(*world.together(lambda: self.broken))  # all are done now
        if self.items and not any(self.repeats()):
            raise UserError("data.folder: none of the images can be decoded")
        return True

    def latents(self, draws: Sequence[Draw], device: torch.device | str) -> Tensor:
        """The latents of a batch of one bucket.  # b c h w"""
        keys = [self._job(draw.item, self.offsets[draw.item][draw.crop], draw.flip).key for draw in draws]
        return torch.stack([self._shelf.get(key)["latents"] for key in keys]).to(device)

    def _job(self, item: int, offset: tuple[int, int], flip: bool) -> Job:
        key = Cache.key("latents", FORMAT, self.items[item].sha256, *self.sizes[item], *offset, flip,
                        self.model_id, str(self.dtype))
        return Job(key, item, offset, flip)

    def _batches(self, batch_size: int) -> Iterator[list[Job]]:
        """All jobs, each key once, by size, then by item: an image is decoded once for all its crops."""
        seen: set[str] = set()
        grouped: dict[Size, list[Job]] = {}
        for i, size in enumerate(self.sizes):
            for offset in self.offsets[i]:
                for flip in (False, True) if self.flips else (False,):
                    job = self._job(i, offset, flip)
                    if job.key not in seen:
                        seen.add(job.key)
                        grouped.setdefault(size, []).append(job)
        for (width, height), jobs in grouped.items():
            yield from _cut([jobs], min(batch_size, max(1, PIXELS // (width * height))))

    def _decoded(self, batches: Sequence[Batch[Job]],
                 on_skip: Callable[[str, str], None]) -> Iterator[tuple[list[Job], list[Tensor]]]:
        """The jobs of each batch whose image can be decoded, and their pixels.  # 3 h w"""
        stream = self._images(dict.fromkeys(job.item for batch in batches for job in batch.jobs))
        current, image = -1, None
        for batch in batches:
            jobs, pixels = [], []
            for job in batch.jobs:
                if job.item != current:
                    current, image = job.item, self._image(job.item, next(stream), on_skip)
                if image is not None:
                    jobs.append(job)
                    pixels.append(crop_pixels(image, self.sizes[job.item], job.offset, job.flip))
            yield jobs, pixels

    def _image(self, item: int, future: Future[Image.Image],
               on_skip: Callable[[str, str], None]) -> Image.Image | None:
        try:
            return future.result()
        except ImageError as error:
            self.broken.add(self.items[item].sha256)
            on_skip(str(self.items[item].path), str(error))
            return None

    def _images(self, items: Iterable[int]) -> Iterator[Future[Image.Image]]:
        """The covering images in turn, decoded a few ahead so that the encoder need not wait."""
        waiting = iter(items)
        with ThreadPoolExecutor(READERS) as pool:
            ahead = deque(self._submit(pool, item) for item in islice(waiting, READERS + 1))
            while ahead:
                yield ahead.popleft()
                ahead.extend(self._submit(pool, item) for item in islice(waiting, 1))

    def _submit(self, pool: ThreadPoolExecutor, item: int) -> Future[Image.Image]:
        return pool.submit(cover_image, self.items[item], self.sizes[item])


class TextStore:
    """Embeddings of every text, and always of the empty prompt: it stands for dropped captions, and pads.

    `model_id` names tokenizer, text encoder and its settings (clip skip) by content.
    """

    def __init__(self, texts: Iterable[str], cache: Cache, model_id: str, dtype: torch.dtype,
                 memory: int = MEMORY) -> None:
        self.texts = list(dict.fromkeys(["", *texts]))
        self.cache, self.model_id, self.dtype = cache, model_id, dtype
        self._shelf = Shelf(cache, memory)

    def missing(self) -> list[str]:
        """The texts that are not in the cache yet."""
        return [text for text in self.texts if not self.cache.has(self._key(text))]

    def fill(self, encode: Callable[[list[str]], dict[str, Tensor]], batch_size: int, progress: Progress,
             should_stop: Callable[[], bool], length: Callable[[str], int] = lambda text: 1,
             world: World = ALONE) -> bool:
        """Encode what is missing, each process of `world` its part; False when `should_stop` ended it early.

        `encode` takes b texts and gives tensors by name, each with b first.  Texts of one `length` (CLIP:
        chunks of 77 tokens) are encoded together, so that none becomes as long as its longest neighbour.
        """
        batches, done, total = _todo(self.cache, world.part(list(self._batches(batch_size, length))))
        progress(done, total)
        for batch in batches:
            if should_stop():
                return False
            tensors = encode([job.text for job in batch.jobs])
            for i, job in enumerate(batch.jobs):
                if job.key in batch.absent:
                    self.cache.put(job.key, {name: self._cast(tensor[i]) for name, tensor in tensors.items()})
            done += len(batch.absent)
            progress(done, total)
        return True

    def embeds(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of a batch, stacked by name (on the CPU), shorter ones padded by the empty prompt's.

        prompt_embeds  # b n d
        """
        entries = [self._shelf.get(self._key(text)) for text in texts]
        empty = self._shelf.get(self._key(""))
        return {name: torch.stack(_pad([entry[name] for entry in entries], empty[name])) for name in empty}

    def _key(self, text: str) -> str:
        return Cache.key("text", FORMAT, text, self.model_id, str(self.dtype))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor  # masks stay what they are

    def _batches(self, batch_size: int, length: Callable[[str], int]) -> Iterator[list[TextJob]]:
        grouped: dict[int, list[TextJob]] = {}
        for text in self.texts:
            grouped.setdefault(length(text), []).append(TextJob(self._key(text), text))
        yield from _cut(grouped.values(), batch_size)


def _cut(groups: Iterable[list[J]], size: int) -> Iterator[list[J]]:
    for jobs in groups:
        yield from (jobs[i:i + size] for i in range(0, len(jobs), size))


def _todo(cache: Cache, all_batches: Iterable[list[J]]) -> tuple[list[Batch[J]], int, int]:
    """The batches with anything absent from the cache, the number of jobs done, and of all.

    Batches are cut from the whole list, and one that is half there is encoded whole: the last bits of an
    encoding depend on its batch, and a run that was killed here must go on with the same bits as one that was
    not.
    """
    batches, total, absent = [], 0, 0
    for jobs in all_batches:
        batch = Batch(jobs, frozenset(job.key for job in jobs if not cache.has(job.key)))
        total += len(jobs)
        absent += len(batch.absent)
        if batch.absent:
            batches.append(batch)
    return batches, total - absent, total


def _pad(tensors: list[Tensor], pad: Tensor) -> list[Tensor]:
    """Sequences of unequal length made as long as the longest, by repeating `pad`.  # n d"""
    longest = max(len(tensor) for tensor in tensors)
    if any((longest - len(tensor)) % len(pad) for tensor in tensors):
        raise ValueError(f"lengths {[len(tensor) for tensor in tensors]} differ by other than {len(pad)}")
    return [torch.cat([tensor, *[pad] * ((longest - len(tensor)) // len(pad))]) for tensor in tensors]
