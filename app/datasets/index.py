"""What a data set's folder holds, in memory: found again when files change, searched, filtered and sorted at once."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from app.datasets.facts import Facts
from app.datasets.thumbnails import LATER, FactsFile, Stamp, Workshop
from app.paths import can_be_sent
from trainer import captions
from trainer.data import folders
from trainer.errors import UserError

LONGEST = 1_000_000  # bytes of a caption that is still read
PAUSE = 1.0  # seconds between two looks at the folder, and at least LEISURE times what a look takes
LEISURE = 20
_DIGITS = re.compile(r"(\d+)")

Filter = Literal["all", "no_caption", "too_small", "duplicate", "excluded", "included", "trouble"]
Sort = Literal["name", "newest", "caption", "longest", "shortest", "largest", "smallest"]


@dataclass(slots=True)
class Record:
    """One image: its file, its caption as it stands, and what is known of its pixels."""

    name: str  # relative to the data set, with "/"
    path: Path
    stamp: Stamp
    repeats: int
    excluded: bool
    mask: bool
    caption: str = ""  # nothing trimmed, lines parted by "\n"
    folded: str = ""  # for searching
    version: str = "none"
    fault: str = ""  # why the caption cannot be read
    foreign: bool = False  # because of its encoding
    caption_stamp: tuple[int, int, int] | None = None
    facts: Facts | None = None

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def sidecar(self) -> str:
        """The caption file's name, relative to the data set."""
        return os.path.splitext(self.name)[0] + ".txt"

    @property
    def mask_name(self) -> str:
        return os.path.splitext(self.name)[0] + folders.MASK

    def files(self) -> list[str]:
        """The names of its image, its mask and its caption, as far as they are there."""
        return [self.name, *([self.mask_name] if self.mask else []), *([self.sidecar] if self.caption_stamp else [])]

    @property
    def pixels(self) -> int:
        return self.facts.width * self.facts.height if self.facts else 0

    def read_caption(self, stamp: tuple[int, int, int] | None) -> None:
        """Take the caption from the disk if its file is another one than last time."""
        if stamp == self.caption_stamp and stamp is not None:
            return
        self.caption, self.version, self.fault, self.foreign, self.caption_stamp = "", "none", "", False, stamp
        path = captions.sidecar(self.path)
        if stamp is not None and stamp[1] > LONGEST:
            self.fault = f"{path}: the caption has {stamp[1]} bytes; the most is {LONGEST}"
        elif stamp is not None:
            try:
                data = path.read_bytes()
                self.version = captions.version(data)
                self.caption = captions.decode(data, path)
            except UserError as error:
                self.fault, self.foreign = str(error), True
            except OSError as error:
                self.fault = f"{path}: the caption cannot be read: {error.strerror}"
        self.folded = self.caption.casefold()


@dataclass
class Hidden:
    """Files that are there and cannot be shown, by reason."""

    reasons: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        return "; ".join(f"{count} image{'s' if count > 1 else ''} not shown: {reason}"
                         for reason, count in self.reasons.items())


class Index:
    """The images of one data set; `tag` changes whenever anything that the page shows does."""

    def __init__(self, root: Path, facts: FactsFile, workshop: Workshop) -> None:
        self.root, self.facts, self.workshop = root, facts, workshop
        self.records: dict[str, Record] = {}
        self.hidden = Hidden()
        self.changes = 0
        self._lock = threading.RLock()
        self._next_look = 0.0

    @property
    def tag(self) -> str:
        return f"{id(self):x}-{self.changes}"

    def refresh(self, at_once: bool = False) -> None:
        """Look at the folder again, unless that was done a moment ago.  Raises `UserError` when it is gone."""
        with self._lock:
            began = time.monotonic()
            if began < self._next_look and not at_once:
                return
            if not self.root.is_dir():
                raise UserError(f"{self.root} is not there any more")
            hidden = Hidden()
            found = {record.name: record for record in self._scan(hidden)}
            if found != self.records or hidden != self.hidden:
                self.changes += 1
            self.records = dict(sorted(found.items(), key=lambda item: _by_name(item[0])))
            self.hidden = hidden
            for record in self.records.values():
                if record.facts is None:
                    self.look_at(record)
            self._next_look = time.monotonic() + max(PAUSE, LEISURE * (time.monotonic() - began))

    def named(self, names: Iterable[str]) -> list[Record]:
        """The records of these names.  Raises `UserError` for one that is not in the data set."""
        found = []
        for name in names:
            if name not in self.records:
                raise UserError(f"{name[:200]!r} is not in this data set any more")
            found.append(self.records[name])
        return found

    def known(self) -> int:
        """Images that were looked at."""
        return sum(record.facts is not None for record in self.records.values())

    def tag_counts(self) -> Counter[str]:
        """How many captions have each tag, as it is mostly written."""
        spelled: Counter[str] = Counter()
        for record in self.records.values():
            spelled.update(dict.fromkeys(tags_of(record.caption)).keys())
        folded: Counter[str] = Counter()
        first: dict[str, str] = {}
        for tag, count in spelled.most_common():
            folded[first.setdefault(tag.casefold(), tag)] += count
        return folded

    def reread(self, sidecars: Collection[str]) -> None:
        """Take these captions from the disk."""
        with self._lock:
            for record in self.records.values():
                if record.sidecar in sidecars:
                    record.read_caption(_stamp_of(captions.sidecar(record.path)))
            self.changes += 1

    def look_at(self, record: Record, urgency: int = LATER) -> None:
        """Have an image's facts found and its thumbnail made."""
        name, stamp = record.name, record.stamp

        def done(facts: Facts) -> None:
            self.facts.put(name, stamp, facts)
            with self._lock:
                now = self.records.get(name)
                if now and now.stamp == stamp:
                    now.facts = facts
                    self.changes += 1

        self.workshop.want(record.path, stamp, done, urgency)

    def _scan(self, hidden: Hidden) -> Iterator[Record]:
        by_folder: dict[Path, list[tuple[str, int]]] = {}
        for path, repeats in folders.walk(self.root, "data set"):
            by_folder.setdefault(path.parent, []).append((path.name, repeats))
        top = os.path.realpath(self.root)
        for folder, files in by_folder.items():
            if not _is_in(os.path.realpath(folder), top):
                hidden.reasons["they lie behind a link that leads out of the data set"] += len(files)
                continue
            there = {entry.name: entry for entry in os.scandir(folder)}
            excluded = folders.excluded_in(folder)
            prefix = os.path.relpath(folder, self.root).replace(os.sep, "/")
            prefix = "" if prefix == "." else prefix + "/"
            for name, repeats in files:
                if reason := _unshowable(prefix + name, there.get(name), top):
                    hidden.reasons[reason] += 1
                elif name in there:
                    yield self._record(prefix + name, folder, there, repeats, name in excluded)

    def _record(self, name: str, folder: Path, there: dict[str, os.DirEntry[str]], repeats: int,
                excluded: bool) -> Record:
        file = name.rpartition("/")[2]
        stem = os.path.splitext(file)[0]
        stat = there[file].stat()
        record = Record(name, folder / file, (stat.st_mtime_ns, stat.st_size), repeats, excluded,
                        stem + folders.MASK in there)
        if old := self.records.get(name):
            for part in ("caption", "folded", "version", "fault", "foreign", "caption_stamp"):
                setattr(record, part, getattr(old, part))
        record.read_caption(_stamp(there.get(stem + ".txt")))
        record.facts = self.facts.get(name, record.stamp)
        return record


def tags_of(caption: str) -> list[str]:
    """The tags of a caption, commas and lines apart."""
    return [tag for line in caption.split("\n") for tag in captions.split_tags(line)]


def find(records: Sequence[Record], *, search: str = "", filter: Filter = "all", tag: str = "",
         too_small: int = 512, sort: Sort = "name") -> list[Record]:
    """The records that match everything asked for, in order.  `records` are in the order of their names."""
    words = search.casefold().split()
    found = [record for record in records if all(word in record.folded for word in words)]
    if tag.strip():
        wanted = tag.strip().casefold()
        found = [record for record in found if wanted in record.folded
                 and wanted in (own.casefold() for own in tags_of(record.caption))]
    if filter == "duplicate":
        repeated = _repeated(records)
        found = [record for record in found if record.name in repeated]
    elif filter != "all":
        found = [record for record in found if _FILTERS[filter](record, too_small)]
    key, backwards = _SORTS[sort]
    return sorted(found, key=key, reverse=backwards) if key else found


def _repeated(records: Sequence[Record]) -> set[str]:
    counts = Counter(record.facts.sha256 for record in records if record.facts and record.facts.sha256)
    return {record.name for record in records if record.facts and counts[record.facts.sha256] > 1}


def is_small(record: Record, side: int) -> bool:
    """Fewer pixels than a square of that side."""
    return 0 < record.pixels < side * side


_FILTERS: dict[str, Callable[[Record, int], bool]] = {
    "no_caption": lambda record, side: not record.caption.strip() and not record.fault,
    "too_small": is_small,
    "excluded": lambda record, side: record.excluded,
    "included": lambda record, side: not record.excluded,
    "trouble": lambda record, side: bool(record.fault or record.facts and record.facts.trouble),
}
_SORTS: dict[str, tuple[Callable[[Record], object] | None, bool]] = {
    "name": (None, False),
    "newest": (lambda record: record.stamp[0], True),
    "caption": (lambda record: record.folded.strip(), False),
    "longest": (lambda record: len(record.caption), True),
    "shortest": (lambda record: len(record.caption), False),
    "largest": (lambda record: record.pixels, True),
    "smallest": (lambda record: record.pixels, False),
}


def _by_name(name: str) -> list[list[int | str]]:
    """Folders before names, and 9 before 10."""
    return [[int(part) if part.isdecimal() else part.casefold() for part in _DIGITS.split(piece)]
            for piece in name.split("/")]


def _stamp(entry: os.DirEntry[str] | None) -> tuple[int, int, int] | None:
    return _stamp_of(entry) if entry else None


def _stamp_of(file: os.DirEntry[str] | Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:  # none there, or a link to nowhere
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _unshowable(name: str, entry: os.DirEntry[str] | None, top: str) -> str:
    """Why an image cannot be named to a browser, or is none of this data set's; "" for nearly all."""
    if set(name) & set(":\\\n") or not can_be_sent(name):
        return 'their names hold ":", "\\", a line break, or what is not Unicode; rename them'
    if entry is not None and entry.is_symlink():
        if not _is_in(os.path.realpath(entry.path), top):
            return "they are links that lead out of the data set"
        if not os.path.exists(entry.path):
            return "they are links to nowhere"
    return ""


def _is_in(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)
