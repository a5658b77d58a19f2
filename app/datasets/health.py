"""Says what may be wrong with a data set, and mends with one entry of the journal what can be mended."""

from __future__ import annotations

import codecs
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.datasets import duplicates, trash
from app.datasets.changes import Change, Move, Write, content
from app.datasets.data_set import DataSet
from app.datasets.index import Record, is_small
from app.paths import can_be_sent, inside
from trainer import captions
from trainer.data import folders
from trainer.errors import UserError

Answer = dict[str, Any]
Level = Literal["bad", "warn", "info"]
ENORMOUS = 40_000_000  # pixels
UNREADABLE_SHARE = 0.3  # of bytes above 127, from which on a text is no Western one


@dataclass(frozen=True)
class Finding:
    """One kind of trouble with the files that have it."""

    kind: str
    level: Level
    title: str
    text: str
    files: Sequence[str]
    groups: Sequence[Sequence[str]] = field(default=())
    are_images: bool = True  # else captions or masks that stand alone


REMEDIES = {
    "unreadable": "Move them to the trash", "tiny": "Exclude them", "duplicate": "Exclude all but one of each",
    "similar": "Exclude all but the largest of each", "not_utf8": "Convert the captions to UTF-8",
    "no_trigger": "Add the trigger word", "lone_caption": "Move them to the trash",
    "lone_mask": "Move them to the trash",
}


def check(data_set: DataSet, trigger: str = "", too_small: int = 512) -> Answer:
    """All findings, the worst first; `known` of `of` images were looked at so far."""
    data_set.index.refresh()
    found = [finding for finding in _findings(data_set, trigger.strip(), too_small) if finding.files]
    found.sort(key=lambda finding: ("bad", "warn", "info").index(finding.level))
    return {"known": data_set.index.known(), "of": len(data_set.index.records),
            "findings": [_told(finding) for finding in found]}


def remedy(data_set: DataSet, kind: str, trigger: str = "", too_small: int = 512) -> Answer:
    """Mend a kind of finding where it is now; never touches an image's bytes."""
    if kind not in REMEDIES:
        raise UserError(f"there is no remedy for {kind[:40]!r}")
    with data_set.journal.held():
        data_set.index.refresh(at_once=True)
        files = [name for finding in _findings(data_set, trigger.strip(), too_small) if finding.kind == kind
                 for name in finding.files]
        if not files:
            return {"changed": 0, "skipped": [], **data_set.state()}
        return _MENDERS[kind](data_set, kind, files, trigger.strip())


def _findings(data_set: DataSet, trigger: str, too_small: int) -> list[Finding]:
    records = data_set.records()
    included = [record for record in records if not record.excluded]
    return [*_of_pixels(included, too_small), *_of_copies(included), *_of_captions(included, trigger),
            *_of_files(data_set.root)]


def _of_pixels(records: Sequence[Record], too_small: int) -> list[Finding]:
    def those(test: Callable[[Any], bool]) -> list[str]:
        return [record.name for record in records if record.facts and test(record.facts)]

    tiny = [record.name for record in records if is_small(record, too_small)]
    return [
        Finding("unreadable", "bad", "Images that cannot be read", "Training leaves them out.",
                those(lambda facts: facts.trouble)),
        Finding("tiny", "warn", "Small images", f"They have fewer pixels than {too_small} × {too_small} and are "
                "enlarged for training, which makes them soft.", tiny),
        Finding("enormous", "info", "Very large images", "They are scaled down for training; preparing them takes "
                "long.", those(lambda facts: facts.width * facts.height > ENORMOUS)),
        Finding("alpha", "info", "Images with transparency", "What is transparent is trained as white, or left out "
                "when masks come from transparency (data.masks).", those(lambda facts: facts.alpha)),
        Finding("turned", "info", "Images turned by their EXIF data", "They are trained upright, as shown here; some "
                "other programs show them lying.", those(lambda facts: facts.turned)),
        Finding("cmyk", "info", "Images for print (CMYK)", "Their colours are converted to sRGB for training.",
                those(lambda facts: facts.cmyk)),
        Finding("deep", "info", "Images with 16 bits a channel", "They are trained with 8.",
                those(lambda facts: facts.deep))]


def _of_copies(records: Sequence[Record]) -> list[Finding]:
    same, similar = duplicates.same(records), duplicates.similar(records)
    by_caption: dict[str, list[str]] = defaultdict(list)
    for record in records:
        if record.caption.strip():
            by_caption[record.caption.strip()].append(record.name)
    equal = [names for names in by_caption.values() if len(names) > 1]
    return [
        Finding("duplicate", "warn", "The same image more than once", "Each copy counts in training.",
                _flat(_names(same)), _names(same)),
        Finding("similar", "info", "Images that look nearly the same", "Training sees them more often than others.",
                _flat(_names(similar)), _names(similar)),
        Finding("equal_caption", "info", "Captions that several images share",
                "What differs between these images cannot be told apart by their captions.", _flat(equal), equal)]


def _of_captions(records: Sequence[Record], trigger: str) -> list[Finding]:
    by_file: dict[str, list[str]] = defaultdict(list)
    for record in records:
        by_file[record.sidecar].append(record.name)
    shared = [names for names in by_file.values() if len(names) > 1]
    lacking = [record.name for record in records if trigger and not record.fault
               and not captions.has_words(record.caption, trigger)]
    return [
        Finding("not_utf8", "bad", "Captions that are not UTF-8", "Training stops at them, and they cannot be edited.",
                [record.name for record in records if record.foreign]),
        Finding("unread_caption", "bad", "Captions that cannot be read", "They have over 1 MB, or the system does not "
                "give them: their cards say which. They can be neither searched nor edited.",
                [record.name for record in records if record.fault and not record.foreign]),
        Finding("no_caption", "warn", "Images without a caption", "They are trained with the trigger word alone, or "
                "with nothing.", [record.name for record in records
                                  if not record.caption.strip() and not record.fault]),
        Finding("one_file", "warn", "Images that have one caption file together",
                "They differ in their endings only, so both have the same .txt.", _flat(shared), shared),
        Finding("no_trigger", "info", "Captions without the trigger word", f"Training puts {trigger!r} before them by "
                "itself; other programs do not.", lacking)]


def _of_files(root: Path) -> list[Finding]:
    """Captions and masks without an image; those of images that cannot be shown have one."""
    lone_captions, lone_masks = [], []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        stems = {os.path.splitext(file)[0] for file in files if folders.is_image(file)}
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        for file in files:
            ending = folders.MASK if folders.is_mask(file) else ".txt"
            if file.startswith(".") or not file.lower().endswith(ending) or (
                    file.endswith(ending) and file.removesuffix(ending) in stems):
                continue
            name = (prefix + file).removeprefix("./")
            if _can_be_named(root, name):
                (lone_captions if ending == ".txt" else lone_masks).append(name)
    return [
        Finding("lone_caption", "info", "Captions without an image", "No image has their name; training passes them "
                "over.", sorted(lone_captions), are_images=False),
        Finding("lone_mask", "info", "Masks without an image", "No image has their name; training passes them over.",
                sorted(lone_masks), are_images=False)]


def _can_be_named(root: Path, name: str) -> bool:
    """Whether the browser can be told of a file, and the trash can take it."""
    try:
        inside(root, name)
    except UserError:
        return False
    return can_be_sent(name)


def _told(finding: Finding) -> Answer:
    label = REMEDIES.get(finding.kind)
    told = {"kind": finding.kind, "level": finding.level, "title": finding.title, "text": finding.text,
            "count": len(finding.files), "files": list(finding.files), "images": finding.are_images,
            "remedy": {"kind": finding.kind, "label": label} if label else None}
    return told | {"groups": [list(group) for group in finding.groups]} if finding.groups else told


# Remedies


def _exclude(data_set: DataSet, kind: str, names: Sequence[str], trigger: str) -> Answer:
    return {"changed": len(names), "skipped": [], **data_set.exclude(names)}


def _exclude_copies(data_set: DataSet, kind: str, names: Sequence[str], trigger: str) -> Answer:
    records = [record for record in data_set.records() if not record.excluded]
    groups = duplicates.same(records) if kind == "duplicate" else duplicates.similar(records)
    others = [record.name for group in groups for record in group if record is not duplicates.best(group)]
    return _exclude(data_set, kind, others, trigger)


def _throw_away(data_set: DataSet, kind: str, names: Sequence[str], trigger: str) -> Answer:
    if kind == "unreadable":
        return {"changed": len(names), "skipped": [], **data_set.delete(names)}
    folder = trash.new_folder()
    what = f"delete {len(names)} {'captions' if kind == 'lone_caption' else 'masks'} without an image"
    changes: list[Change] = [Move(name, f"{folder}/{name}") for name in names]
    return {"changed": len(names), "skipped": [], **data_set.change(what, changes)}


def _convert(data_set: DataSet, kind: str, names: Sequence[str], trigger: str) -> Answer:
    changes: dict[str, Change] = {}
    skipped = []
    for record in data_set.records(names):
        try:
            data = content(data_set.root, record.sidecar) or b""
            if (new := guess_text(data).encode()) != data:
                changes[record.sidecar] = Write(record.sidecar, data, new)
        except UserError as error:
            skipped.append((record.name, str(error)))
    answer = data_set.change(f"convert {len(changes)} captions to UTF-8", list(changes.values())) if changes else (
        data_set.state())
    return {"changed": len(changes), "skipped": skipped, **answer}


def _add_trigger(data_set: DataSet, kind: str, names: Sequence[str], trigger: str) -> Answer:
    texts = {record.name: f"{trigger}, {record.caption}" if record.caption.strip() else trigger
             for record in data_set.records(names)}
    return data_set.apply_captions(f'add the trigger word "{trigger}"', texts)


def guess_text(data: bytes) -> str:
    """The text of a caption in UTF-8, UTF-16 or a Western 8-bit encoding.  Raises `UserError` for what is none."""
    encodings = ["utf-16"] if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else []
    if not encodings and b"\0" in data:
        encodings = ["utf-16-le" if data[1:2] == b"\0" else "utf-16-be"]
    elif not encodings and sum(byte > 127 for byte in data) <= UNREADABLE_SHARE * len(data):
        encodings = ["cp1252", "latin-1"]
    for encoding in ["utf-8", *encodings]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError("its encoding cannot be told; open it in the editor that wrote it and save it as UTF-8")


def _names(groups: Sequence[Sequence[Record]]) -> list[list[str]]:
    return [[record.name for record in group] for group in groups]


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [name for group in groups for name in group]


_MENDERS: dict[str, Callable[[DataSet, str, Sequence[str], str], Answer]] = {
    "unreadable": _throw_away, "tiny": _exclude, "duplicate": _exclude_copies, "similar": _exclude_copies,
    "not_utf8": _convert, "no_trigger": _add_trigger, "lone_caption": _throw_away, "lone_mask": _throw_away,
}
