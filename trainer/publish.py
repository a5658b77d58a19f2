"""Writes a run's LoRA file, reads it back, and says how true to the live adapter it is."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainer import captions
from trainer.errors import UserError
from trainer.events import EventReader
from trainer.export import formats, metadata, names, reading, stacked, verify, writer
from trainer.export.lora_file import open_lora
from trainer.export.writer import Pair
from trainer.session import Session


def publish(session: Session, path: Path) -> None:
    """Export the adapter to `path`; an `export` event carries the verdict of reading the file back.

    Raises `UserError` when the file does not hold what was trained.
    """
    family, weights = session.preset.model.family, session.shown_weights
    chosen = session.preset.output.dtype
    dtype = formats.DTYPES[family] if chosen == "auto" else chosen
    path.parent.mkdir(exist_ok=True)
    pairs = list(session.adapter.pairs(weights))
    written = writer.write(path, pairs, family=family, dtype=dtype, metadata=_header(session, pairs),
                           form=session.preset.output.format)
    comparison = verify.compare(path, pairs, family=family)
    unmatched = comparison.unmatched
    trained = {names.canonical(name): (len(up), *down.shape[1:]) for name, up, down, _ in stacked.apart(pairs)}
    readers, others = reading.readers(open_lora(path, family=family), trained)
    session.recorder.event(
        "export", step=session.progress.step, path=path.relative_to(session.run.path).as_posix(), format=written.format,
        weights=weights, dtype=dtype, bytes=written.bytes, worst_rel_error=comparison.worst_rel_error,
        unmatched=unmatched, zero=comparison.zero, readers=readers, others=others)
    if unmatched:
        raise UserError(f"{path}: the exported file does not hold all of the trained adapter: "
                        + ", ".join(unmatched[:5]))


def _header(session: Session, pairs: Sequence[Pair]) -> dict[str, str]:
    """The file's metadata: what was trained, on what, how."""
    progress = session.progress
    return metadata.build(
        preset=session.preset, run_name=session.run.name, dataset=_dataset(session),
        prediction=session.base.prediction_type, variant=session.base.variant,
        rank=max(down.shape[0] for _, _, down, _ in pairs), steps=progress.step,
        epochs=progress.step // session.order.steps_per_epoch, global_batch=progress.global_batch,
        started_at=_started(session), finished_at=time.time(),
        cover=_newest_sample(session) if session.preset.output.cover else None)


def _newest_sample(session: Session) -> Path | None:
    """The first prompt's newest picture of a trained step; None before there is one."""
    pictures = [path for path in session.run.samples.glob("*_00.png") if re.fullmatch(r"(?!0+_)\d+_00", path.stem)]
    return max(pictures, default=None)


def _dataset(session: Session) -> metadata.Dataset:
    """What was trained on, by folder: images, repeats, tags; and by bucket."""
    tags: dict[str, Counter[str]] = {}
    images: Counter[str] = Counter()
    repeats: dict[str, int] = {}
    readable = [i for i in session.latents.readable() if not session.latents.items[i].prior]
    for item in (session.latents.items[i] for i in readable):
        folder = item.path.parent.name
        tags.setdefault(folder, Counter()).update(captions.split_tags(item.caption))
        images[folder] += 1
        repeats[folder] = item.repeats
    return metadata.Dataset(folders={name: (repeats[name], images[name]) for name in images},
                            buckets=Counter(session.latents.sizes[i] for i in readable), tags=tags)


def _started(session: Session) -> float:
    """When the run first began, in seconds since 1970."""
    for event in EventReader(session.run.events).read():
        if event["kind"] == "start":
            return event.get("t", time.time())
    return time.time()
