"""Does a captioning task: reads images, asks the model, writes down what it proposes; captions stay as they are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from trainer import captions, download, gpu
from trainer.caption import models, wording
from trainer.caption.models import Captioner
from trainer.caption.task import SECTION, Settings, Task
from trainer.control import Requests, Stopped
from trainer.data import folders, images
from trainer.data.decoding import READERS
from trainer.data.images import ImageError
from trainer.errors import UserError
from trainer.events import EventWriter
from trainer.faults import as_user_error, describe

PIXELS = 1 << 20  # that a model gets to see of one image: more costs memory and adds little to a caption


@dataclass(frozen=True)
class Work:
    """An image that is to get a caption, the name it goes by, and the caption that it has."""

    path: Path
    name: str
    before: str


def run(task: Task, workspace: Path) -> str:
    """Work through a task; "done" or "stopped".  Its last event says how it ended.

    Raises `UserError` for what a user can cause.
    """
    with task.hold(), Requests(task) as requests:
        events, results = EventWriter(task.events), EventWriter(task.results)
        try:
            settings = task.settings()
            events.write("start", name="looking for images", model=settings.model, folder=settings.folder)
            return _caption(settings, workspace, events, results, requests)
        except BaseException as error:
            plain = _as_user_error(error)
            with suppress(OSError):  # the disk may be full
                events.write("end", reason="error", error=str(plain or describe(error)))
            if plain is None or plain is error:
                raise
            raise plain from error
        finally:
            events.close()
            results.close()


def find_work(settings: Settings, on_skip: Callable[[str, str], None]) -> list[Work]:
    """The images that a task is for, in the order of their names.  Raises `UserError` when there are none."""
    root = Path(settings.folder)
    if settings.images:  # chosen by hand: an image left out of training may have a caption too
        there = {path.relative_to(root).as_posix(): path for path, _ in folders.walk(root, f"{SECTION}.folder")}
        if missing := sorted(set(settings.images) - set(there)):
            raise UserError(f"{SECTION}.images: not in {root}: {', '.join(missing[:5])}")
        found = {name: there[name] for name in sorted(set(settings.images))}
    else:
        found = {path.relative_to(root).as_posix(): path
                 for path, _ in folders.find_images(root, f"{SECTION}.folder")}
    work = []
    for name, path in found.items():
        try:
            before = captions.read(captions.sidecar(path))
        except UserError as error:
            on_skip(name, str(error))
            continue
        if settings.mode != "missing" or not before:
            work.append(Work(path, name, before))
    return work[:settings.preview or None]


def _caption(settings: Settings, workspace: Path, events: EventWriter, results: EventWriter,
             requests: Requests) -> str:
    work = find_work(settings, lambda name, reason: events.write("skipped", file=name, reason=reason))
    done = 0
    try:
        if work:
            device = gpu.pick_device(settings.device, f"{SECTION}.device")
            events.write("phase", name="looking for the model")
            folder = models.find(settings.model, lambda progress: (requests.guard(), events.write(
                "phase", name=f"downloading the model: {download.describe(progress)}")))
            with gpu.turn(workspace, device, lambda: (events.write("waiting"), requests.guard())):
                events.write("phase", name="loading the model")
                captioner = models.load(settings, folder, device, gpu.pick_dtype(settings.precision, device))
                for item, said in ask(captioner, work, settings.batch_size, events, requests.guard):
                    done += 1
                    _write_down(item, said, captioner.tags, settings, events, results)
                    events.write("progress", done=done, of=len(work))
    except Stopped:
        events.write("end", reason="stopped", done=done, of=len(work))
        return "stopped"
    events.write("end", reason="done", done=done, of=len(work))
    return "done"


def _write_down(item: Work, said: str | ImageError, tags: bool, settings: Settings, events: EventWriter,
                results: EventWriter) -> None:
    if isinstance(said, ImageError):
        events.write("skipped", file=item.name, reason=str(said))
    elif not said.strip():
        nothing = "no tag is as sure as the threshold" if tags else "the model said nothing"
        events.write("skipped", file=item.name, reason=nothing)
    else:
        after = wording.propose(item.before, said, mode=settings.mode, prefix=settings.prefix, tags=tags)
        results.write("caption", image=item.name, before=item.before, after=after)


def ask(captioner: Captioner, work: Sequence[Work], batch_size: int, events: EventWriter,
        guard: Callable[[], None]) -> Iterator[tuple[Work, str | ImageError]]:
    """What the captioner says of each image, or why the image cannot be read.

    A batch that is too large for the memory is halved, and later ones with it.  `guard` is called before each.
    """
    with ThreadPoolExecutor(READERS) as pool:
        waiting: dict[int, Future[Image.Image]] = {}
        at = 0
        while at < len(work):
            guard()
            for place in range(at, min(at + 2 * batch_size, len(work))):  # the next ones, while the model works
                if place not in waiting:
                    waiting[place] = pool.submit(_read, work[place].path)
            batch = work[at:at + batch_size]
            pictures = [_result(waiting[at + place]) for place in range(len(batch))]
            readable = [picture for picture in pictures if isinstance(picture, Image.Image)]
            try:
                said = iter(captioner.caption(readable) if readable else [])
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
                events.write("note", text=f"the GPU's memory is short: going on with {batch_size} at a time")
                gc.collect()
                torch.cuda.empty_cache()
                continue
            for item, picture in zip(batch, pictures):
                del waiting[at]
                at += 1
                yield item, next(said) if isinstance(picture, Image.Image) else picture


def _read(path: Path) -> Image.Image:
    """An image upright, RGB, transparency over white, no larger than a model needs.  Raises `ImageError`."""
    if reason := images.unreadable_type(path.name):
        raise ImageError(reason)
    try:
        image = images.decode(path.read_bytes())
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
    scale = (PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)


def _result(future: Future[Image.Image]) -> Image.Image | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error


def _as_user_error(error: BaseException) -> UserError | None:
    """What a user can mend, in words that fit a captioner; None for a fault of the program."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return UserError("the GPU ran out of memory with one image: choose a smaller model, wait until nothing else "
                         f"uses the GPU, or set {SECTION}.device = 'cpu'")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return UserError("the memory of this machine ran out: choose a smaller model, or close other programs")
    return as_user_error(error)
