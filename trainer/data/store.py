"""Latents and prompt embeddings of a data set: encoded once, kept in the cache, handed out by the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.buckets import Size
from trainer.data.cache import Cache
from trainer.data.dataset import Item, crop_picture, to_unit, wanted
from trainer.data.decoding import Decoders, Picture, processes_for
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


class Download:
    """A tensor on its way from its device to the host, in memory that the device copies to by itself."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self.arrived = torch.cuda.Event() if tensor.device.type == "cuda" else None
        self.tensor = tensor.to("cpu", dtype, non_blocking=self.arrived is not None)
        if self.arrived is not None:
            self.arrived.record()

    def result(self) -> Tensor:
        """The tensor, once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


def upload(crops: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Crops h w 3 (uint8) of one size on the device, in [-1, 1]; the host does not wait for the copy.  # b 3 h w"""
    if not crops:
        return torch.zeros(0, 3, 0, 0, device=device)
    pixels = torch.empty(len(crops), *crops[0].shape, dtype=torch.uint8, pin_memory=device.type == "cuda")  # b h w 3
    for row, crop in zip(pixels.numpy(), crops):
        row[...] = crop
    return to_unit(pixels.to(device, non_blocking=True))


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
        jobs = [job for batch in self._batches(1) for job in batch]
        absent = self.cache.absent([job.key for job in jobs])
        return [job for job in jobs if job.key in absent]

    def readable(self) -> list[int]:
        """Positions of the items that are not broken, as far as is known."""
        return [i for i, item in enumerate(self.items) if item.sha256 not in self.broken]

    def repeats(self) -> list[int]:
        """The items' repeats for `Order`; 0 for those found broken."""
        return [0 if item.sha256 in self.broken else item.repeats for item in self.items]

    def fill(self, encode: Callable[[Tensor], Tensor], batch_size: int, progress: Progress,
             should_stop: Callable[[], bool], on_skip: Callable[[str, str], None], world: World = ALONE,
             device: torch.device | str = "cpu") -> bool:
        """Encode what is missing, at most `batch_size` images at a time; False when `should_stop` ended it early.

        Each process of `world` does its part, all into the one cache.

        `encode` takes pixels in [-1, 1]  # b 3 h w  on `device` and gives latents  # b c h' w'.  An image that breaks
        while decoding is told to `on_skip(file, reason)` and left out.  Raises `UserError` when all are.
        """
        batches, done, total = _todo(self.cache, world.part(list(self._batches(batch_size))))
        items = list(dict.fromkeys(job.item for batch in batches for job in batch.jobs))
        files = [wanted(self.items[item], self.sizes[item]) for item in items]
        progress(done, total)
        with Writer(self.cache) as writer, Decoders(processes_for(files, world.size)) as decoders:
            uploads = self._uploads(batches, decoders.pictures(files), torch.device(device), on_skip)
            coming: deque[tuple[Batch[Job], list[Job], Download]] = deque()
            for batch, jobs, pixels in uploads:
                if should_stop():
                    return False
                coming.append((batch, jobs, Download(encode(pixels) if jobs else pixels, self.dtype)))
                if len(coming) > 1:  # so that the device has work while the last batch's is put away
                    done += self._put_away(writer, *coming.popleft())
                    progress(done, total)
            while coming:
                done += self._put_away(writer, *coming.popleft())
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

    def _uploads(self, batches: Sequence[Batch[Job]], pictures: Iterator[Future[Picture]], device: torch.device,
                 on_skip: Callable[[str, str], None]) -> Iterator[tuple[Batch[Job], list[Job], Tensor]]:
        """Each batch, those of its jobs whose image can be decoded, and their pixels on the device.  # b 3 h w"""
        current, picture = -1, None
        for batch in batches:
            jobs, crops = [], []
            for job in batch.jobs:
                if job.item != current:
                    current, picture = job.item, self._picture(job.item, next(pictures), on_skip)
                if picture is not None:
                    jobs.append(job)
                    crops.append(crop_picture(picture, self.sizes[job.item], job.offset, job.flip))
            yield batch, jobs, upload(crops, device)

    def _picture(self, item: int, future: Future[Picture], on_skip: Callable[[str, str], None]) -> Picture | None:
        try:
            return future.result()
        except ImageError as error:
            self.broken.add(self.items[item].sha256)
            on_skip(str(self.items[item].path), str(error))
            return None

    def _put_away(self, writer: Writer, batch: Batch[Job], jobs: Sequence[Job], latents: Download) -> int:
        """Have what the cache lacks of a batch written; how many jobs are done with it."""
        for job, latent in zip(jobs, latents.result()):
            if job.key in batch.absent:
                writer.put(job.key, {"latents": latent})
        return len(batch.absent)


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
        absent = self.cache.absent([self._key(text) for text in self.texts])
        return [text for text in self.texts if self._key(text) in absent]

    def fill(self, encode: Callable[[list[str]], dict[str, Tensor]], batch_size: int, progress: Progress,
             should_stop: Callable[[], bool], length: Callable[[str], int] = lambda text: 1,
             world: World = ALONE) -> bool:
        """Encode what is missing, each process of `world` its part; False when `should_stop` ended it early.

        `encode` takes b texts and gives tensors by name, each with b first.  Texts of one `length` (CLIP:
        chunks of 77 tokens) are encoded together, so that none becomes as long as its longest neighbour.
        """
        batches, done, total = _todo(self.cache, world.part(list(self._batches(batch_size, length))))
        progress(done, total)
        with Writer(self.cache) as writer:
            for batch in batches:
                if should_stop():
                    return False
                tensors = {name: self._cast(tensor).cpu() for name, tensor in encode([
                    job.text for job in batch.jobs]).items()}
                for i, job in enumerate(batch.jobs):
                    if job.key in batch.absent:
                        writer.put(job.key, {name: tensor[i] for name, tensor in tensors.items()})
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
    parts = list(all_batches)
    keys = [job.key for jobs in parts for job in jobs]
    absent = cache.absent(keys)
    batches = [Batch(jobs, absent.intersection(job.key for job in jobs)) for jobs in parts]
    return [batch for batch in batches if batch.absent], len(keys) - len(absent), len(keys)


def _pad(tensors: list[Tensor], pad: Tensor) -> list[Tensor]:
    """Sequences of unequal length made as long as the longest, by repeating `pad`.  # n d"""
    longest = max(len(tensor) for tensor in tensors)
    if any((longest - len(tensor)) % len(pad) for tensor in tensors):
        raise ValueError(f"lengths {[len(tensor) for tensor in tensors]} differ by other than {len(pad)}")
    return [torch.cat([tensor, *[pad] * ((longest - len(tensor)) // len(pad))]) for tensor in tensors]
