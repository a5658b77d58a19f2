"""Images decoded and resized ahead of their turn, in processes of their own where there are many.

Run as a program, it is one of those processes, and there in a tenth of a second: it loads neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO, NamedTuple

from PIL import Image

from trainer.cores import usable
from trainer.data import images
from trainer.data.buckets import Size, cover
from trainer.data.images import ImageError
from trainer.detached import HOME

READERS = min(8, usable())  # threads: hashing, most decoding and resizing run outside Python's lock
MOST = 16  # processes, each of some 50 MB and its image
WORTH = 200_000_000  # pixels in files, some five seconds of one core: no process is started for fewer
AHEAD = 1 << 29  # pixels, as they are in files, that may be on their way at a time: 1.6 GB
TRIES = 2  # a process may be killed where memory is short; an image that ends two is to blame
READY = b"ready\n"
PIPE = 1 << 20  # bytes, where the system lets us choose


@dataclass(frozen=True)
class Wanted:
    """An image that is to cover `size`: its file, the sha256 of its bytes, and how many pixels it has there."""

    path: Path
    sha256: str
    pixels: int
    size: Size


class Picture(NamedTuple):
    """Pixels row by row, three bytes each."""

    width: int
    height: int
    rgb: bytes


def processes_for(wanted: Sequence[Wanted], sharing: int = 1) -> int:
    """How many processes to decode images with, where `sharing` programs do such work; 0: none is worth its start."""
    cores = usable() // sharing
    return min(MOST, cores) if cores > 1 and sum(image.pixels for image in wanted) >= WORTH else 0


def cover_image(path: Path, sha256: str, size: Size) -> Image.Image:
    """The image as RGB, resized by Lanczos so that it just covers `size`.

    Raises `ImageError` when it is broken, or not the one that was hashed: the cache must tell the truth.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError("changed since the data set was read; start again to train on what it is now")
    image = images.decode(data)
    full = cover(image.width, image.height, size)
    if full[0] * full[1] > images.MAX_PIXELS:
        raise ImageError(f"{image.width} × {image.height} pixels are too narrow a strip to fill "
                         f"{size[0]} × {size[1]}")
    return image if image.size == full else image.resize(full, Image.Resampling.LANCZOS)


class Decoders:
    """Covering images in the order they are wanted, some of them ready before they are asked for.

    Made in `processes` of their own, or with 0 in threads of this one: the pixels are the same. Nothing outlives the
    `with`; and a process whose trainer was killed ends by itself, as nobody writes to it any more.
    """

    def __init__(self, processes: int) -> None:
        self.processes, self.count = processes, processes or READERS
        self.threads = ThreadPoolExecutor(self.count, "decode")
        self.started: list[Decoder] = []
        self.idle: SimpleQueue[Decoder] = SimpleQueue()
        self.open = True

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False
        for decoder in list(self.started):
            decoder.kill()  # so that no thread waits for an answer
        self.threads.shutdown(cancel_futures=True)
        for decoder in self.started:
            decoder.close()

    def pictures(self, wanted: Sequence[Wanted]) -> Iterator[Future[Picture]]:
        """A future of each image in turn; its result raises `ImageError` where the image cannot be used."""
        waiting, room = deque(wanted), AHEAD
        coming: deque[tuple[int, Future[Picture]]] = deque()
        while waiting or coming:
            while waiting and len(coming) <= 2 * self.count and (not coming or waiting[0].pixels <= room):
                image = waiting.popleft()
                room -= image.pixels
                coming.append((image.pixels, self.threads.submit(self._make, image)))
            pixels, future = coming.popleft()
            yield future
            room += pixels

    def _make(self, image: Wanted) -> Picture:
        for _ in range(TRIES):
            if (decoder := self._take()) is None:
                return picture_of(cover_image(image.path, image.sha256, image.size))
            try:
                found = decoder.ask(image)
            except (OSError, ValueError):  # it is gone, in the middle of whatever it did
                decoder.kill()
                if not self.open:
                    raise
                continue
            self.idle.put(decoder)
            if isinstance(found, str):
                raise ImageError(found)
            return found
        raise ImageError("broken: it ends the process that decodes it, each time")

    def _take(self) -> Decoder | None:
        """A process that is idle or new; None where none is wanted, or none can be started (no room, no rights)."""
        with suppress(Empty):
            return self.idle.get_nowait()
        if not self.processes:
            return None
        try:
            decoder = Decoder()
        except OSError:
            self.processes = 0
            return None
        self.started.append(decoder)
        if not self.open:
            decoder.kill()
        if decoder.is_ready():
            return decoder
        self.processes = 0
        return None


class Decoder:
    """This module as a process of its own, which answers one request after the other."""

    def __init__(self) -> None:
        # Apart from the terminal, since Ctrl-C is for the trainer, which ends its processes when it stops.
        posix = sys.platform != "win32"
        self.process = subprocess.Popen([sys.executable, "-m", __name__], cwd=HOME, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, pipesize=PIPE if sys.platform == "linux" else -1,
                                        start_new_session=posix,
                                        creationflags=0 if posix else subprocess.CREATE_NO_WINDOW)

    def is_ready(self) -> bool:
        """Wait until it has begun; False when it ends instead."""
        return self.process.stdout is not None and self.process.stdout.readline() == READY

    def ask(self, image: Wanted) -> Picture | str:
        """The covering image, or why there is none.  Raises `OSError` or `ValueError` when the process is gone."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None and answers is not None
        requests.write(json.dumps([os.path.abspath(image.path), image.sha256, image.size]).encode() + b"\n")
        requests.flush()
        told = json.loads(answers.readline())
        if isinstance(told, str):
            return told
        width, height = told
        rgb = answers.read(3 * width * height)
        if len(rgb) < 3 * width * height:
            raise ValueError("the process is gone")
        return Picture(width, height, rgb)

    def kill(self) -> None:
        """End it, whatever it is doing; another thread may be waiting for its answer, and gets none."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Let go of the pipes to a process that has ended."""
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # a request that never got there
                if pipe is not None:
                    pipe.close()


def picture_of(image: Image.Image) -> Picture:
    return Picture(image.width, image.height, image.tobytes())


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Say that it begins, and answer requests until there are no more: each is a line of JSON, and answered by another
    one (width and height, or what is wrong) and the pixels."""
    answers.write(READY)
    answers.flush()
    for line in requests:
        path, sha256, size = json.loads(line)
        try:
            width, height, rgb = picture_of(cover_image(Path(path), sha256, tuple(size)))
        except ImageError as error:
            answers.write(json.dumps(str(error)).encode() + b"\n")
        else:
            answers.write(json.dumps([width, height]).encode() + b"\n" + rgb)
        answers.flush()


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except OSError:  # nobody waits for the answer any more
        os._exit(1)
