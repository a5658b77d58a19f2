"""One data set as the app sees it: its images as cards, and every change to it as one entry of its journal."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from app.datasets import arrange, trash, upload
from app.datasets.changes import Change, Write, content
from app.datasets.facts import LARGE, SIDE, Facts
from app.datasets.index import Filter, Index, Record, Sort, find
from app.datasets.journal import Changed, Done, Entry, Journal
from app.datasets.thumbnails import SOON, FactsFile, Workshop
from app.paths import inside
from trainer import captions
from trainer.errors import UserError

Answer = dict[str, Any]
MOST_CARDS = 500
WAIT = 10.0  # seconds for one large picture


class DataSet:
    """A folder of images with captions.  Holds nothing that is not on the disk."""

    def __init__(self, id: str, root: Path, facts: FactsFile, workshop: Workshop) -> None:
        self.id, self.root = id, root
        self.journal = Journal(root)
        self.index = Index(root, facts, workshop)
        self.index.refresh()

    # What there is

    def info(self) -> Answer:
        """Counts, what can be undone, and a tag that changes whenever anything does."""
        self.index.refresh()
        records = self.index.records.values()
        counts: dict[str, list[int]] = {}
        for record in records:
            counts.setdefault(record.folder, [0, record.repeats])[0] += 1
        return {"id": self.id, "name": self.root.name, "folder": self.root.as_posix(), "images": len(records),
                "excluded": sum(record.excluded for record in records),
                "captioned": sum(bool(record.caption.strip()) for record in records),
                "looked_at": self.index.known(), **self.state(),
                "folders": [{"name": name, "images": count, "repeats": repeats}
                            for name, (count, repeats) in counts.items()],
                "note": "; ".join(filter(None, [self.journal.note, self.index.hidden.sentence()]))}

    def state(self) -> Answer:
        """What every answer tells of the whole."""
        undo, redo = self.journal.next_undo(), self.journal.next_redo()
        return {"undo": undo.what if undo else None, "undo_id": undo.id if undo else None,
                "redo": redo.what if redo else None, "redo_id": redo.id if redo else None,
                "tag": f"{self.index.tag}-{undo.id if undo else 0}-{redo.id if redo else 0}"}

    def records(self, names: Sequence[str] | None = None) -> list[Record]:
        """All images in the order of their names, or these."""
        return list(self.index.records.values()) if names is None else self.index.named(names)

    def list_images(self, search: str = "", filter: Filter = "all", sort: Sort = "name", tag: str = "",
                    names: Sequence[str] | None = None, start: int = 0, count: int = 60,
                    too_small: int = 512) -> Answer:
        """A page of cards; with the first one also the names of all that match."""
        self.index.refresh()
        wanted = None if names is None else set(names)
        records = [record for record in self.records() if wanted is None or record.name in wanted]
        found = find(records, search=search, filter=filter, tag=tag, too_small=too_small, sort=sort)
        shown = found[max(0, start):max(0, start) + min(count, MOST_CARDS)]
        answer = {"total": len(found), "start": start, "cards": [self._card(record) for record in shown],
                  **self.state()}
        return answer | {"names": [record.name for record in found]} if start == 0 else answer

    def thumbs(self, names: Sequence[str]) -> Answer:
        """Where thumbnails stand; those that are not made yet are made before all others."""
        return {"thumbs": {record.name: self._thumb(record)
                           for record in self.index.named(names[:MOST_CARDS])}}

    def large(self, name: str) -> Answer:
        """An upright view of up to 1280 pixels, made now if need be."""
        [record] = self.index.named([name])
        target, facts = self.index.workshop.file_of(record.path, record.stamp, LARGE), record.facts
        if facts is None or not target.exists():
            facts = self._look_at(record) or facts  # not the record's: a refresh may have replaced it meanwhile
        if facts is None or not target.exists():
            trouble = facts.trouble if facts else ""
            raise UserError(f"{name}: {trouble or 'the picture is still being made; try again in a moment'}")
        return {"path": target.as_posix(), "width": facts.width, "height": facts.height}

    def _look_at(self, record: Record) -> Facts | None:
        """The facts of an image once its large view is made; None when that takes too long."""
        found, made = list[Facts](), Event()

        def done(facts: Facts) -> None:
            found.append(facts)
            made.set()

        self.index.workshop.want(record.path, record.stamp, done, SOON, LARGE)
        made.wait(WAIT)
        return found[0] if found else None

    def tags(self, prefix: str = "", most: int = 20) -> Answer:
        """The set's own tags, the most frequent first."""
        start = prefix.strip().casefold()
        found = [[tag, count] for tag, count in self.index.tag_counts().most_common()
                 if tag.casefold().startswith(start)]
        return {"tags": found[:most]}

    def mask(self, name: str) -> Answer:
        """The mask beside an image, as base64, "" when there is none; and its version."""
        [record] = self.index.named([name])
        data = content(self.root, record.mask_name)
        return {"png": base64.b64encode(data or b"").decode(), "version": captions.version(data)}

    # Changes of captions

    def save_caption(self, name: str, text: str, version: str) -> Answer:
        """Write a caption if it is still the one of that version; else nothing is written and theirs comes back."""
        with self.journal.held():
            [record] = self.index.named([name])
            data = content(self.root, record.sidecar)
            now = captions.version(data)
            theirs = captions.decode(data or b"", inside(self.root, record.sidecar))
            if captions.decode(captions.encode(text), record.path) == theirs:
                return {"saved": True, "version": now, **self.state()}
            if now != version:
                self.index.reread({record.sidecar})
                return {"saved": False, "conflict": {"text": theirs, "version": now}, **self.state()}
            new = captions.encode(text, like=data or b"")
            answer = self.change(f"edit the caption of {name}", [Write(record.sidecar, data, new)])
            return {"saved": True, "version": captions.version(new), **answer}

    def apply_captions(self, what: str, texts: Mapping[str, str], before: Mapping[str, str] | None = None) -> Answer:
        """Write many captions as one entry; those that no longer say what `before` says are skipped and named."""
        with self.journal.held():
            changes: dict[str, Change] = {}
            skipped: list[tuple[str, str]] = []
            for name, text in texts.items():
                try:
                    [record] = self.index.named([name])
                    data = content(self.root, record.sidecar)
                    theirs = captions.decode(data or b"", inside(self.root, record.sidecar))
                    if before is not None and theirs.strip() != before.get(name, "").strip():
                        raise UserError("its caption was changed since")
                    new = captions.encode(text, like=data or b"")
                except UserError as error:
                    skipped.append((name, str(error)))
                    continue
                if captions.decode(new, record.path) != theirs:
                    changes[record.sidecar] = Write(record.sidecar, data, new)
            answer = self.change(what, list(changes.values())) if changes else self.state()
            return {"changed": len(changes), "skipped": skipped, **answer}

    # Changes of images

    def exclude(self, names: Sequence[str], excluded: bool = True) -> Answer:
        """Leave images out of training, or take them in again; their files stay where they are."""
        with self.journal.held():
            changes = arrange.exclusions(self.root, self.index.named(names), excluded)
            what = f"{'exclude' if excluded else 'include'} {_count(names)}"
            return self.change(what, changes) if changes else self.state()

    def delete(self, names: Sequence[str], what: str = "") -> Answer:
        """Put images with their captions and masks into the trash."""
        with self.journal.held():
            chosen, folder = self.index.named(names), trash.new_folder()
            changes = arrange.into_trash(self.root, chosen, self.records(), folder)
            return self.change(what or f"delete {_count(names)}", changes)

    def move(self, names: Sequence[str], folder: str) -> Answer:
        """Put images with their captions and masks into another folder of the data set, "" is the top."""
        with self.journal.held():
            chosen = [record for record in self.index.named(names) if record.folder != folder]
            if not chosen:
                return self.state()
            changes = arrange.into_folder(self.root, chosen, self.records(), folder)
            return self.change(f"move {_count(chosen)} to {folder or 'the top folder'}", changes)

    def save_mask(self, name: str, png: bytes | None, version: str | None = None) -> Answer:
        """Write the mask beside an image, or put it away; nothing is written over one of another version than given."""
        with self.journal.held():
            [record] = self.index.named([name])
            if png is not None:
                arrange.check_mask(record, png)
            write = Write(record.mask_name, content(self.root, record.mask_name), png)
            now = captions.version(write.before)
            if write.before == write.after:
                return {"saved": True, **self.state()}
            if version not in (None, now):
                return {"saved": False, "version": now, **self.state()}
            answer = self.change(f"{'remove' if png is None else 'draw'} the mask of {name}", [write])
            return {"saved": True, **answer}

    def add_files(self, files: Sequence[tuple[str, Path]], excluded: Collection[str] = ()) -> Answer:
        """Take in copies of images, captions, masks and zips of them; what cannot be taken is named with its reason.

        `excluded` names those of the images that are left out of training here, too.
        """
        with upload.staged(self.root, files) as batch, self.journal.held(), upload.in_trash(self.root, batch):
            self.index.refresh(at_once=True)
            plan = upload.plan(self.root, batch, self.records(), excluded)
            answer = self.change(plan.what(), plan.changes) if plan.changes else self.state()
            return {"added": plan.images, "captions": plan.captions, "refused": plan.refused, **answer}

    def send(self, names: Sequence[str], other: DataSet, keep: bool = True) -> Answer:
        """Copy images with captions and masks to another data set, or move them there; the excluded ones stay so."""
        if other.root == self.root:
            raise UserError("that is the same data set; to move images within it, choose one of its folders")
        chosen = self.index.named(names)
        files = {name: self.root / name for record in chosen for name in record.files()}
        taken = other.add_files(list(files.items()), {record.name for record in chosen if record.excluded})
        refused = {name for name, _ in taken["refused"]}
        sent = [record.name for record in chosen if not refused.intersection(record.files())]
        if not keep and sent:
            self.delete(sent, f"move {_count(sent)} to {other.root.name}")
        return {"sent": len(sent), "refused": taken["refused"], **self.state()}

    # Trash, undo, redo

    def trash(self) -> Answer:
        return trash.listing(self.root)

    def restore(self, keys: Sequence[str]) -> Answer:
        """Take files out of the trash, to where they were; an image that was excluded still is."""
        with self.journal.held():
            changes = trash.restoring(self.root, keys)
            count = len(set(keys))
            return self.change(f"restore {count} file{'s' * (count != 1)}", changes)

    def empty_trash(self) -> Answer:
        """Remove what is in the trash, for good."""
        with self.journal.held():
            return trash.empty(self.root) | self.state()

    def undo(self, entry_id: int | None = None, skip_changed: bool = False) -> Answer:
        """Take back the newest change, if it is still the one of this id: another window may have made one since."""
        with self.journal.held():
            return self._turn(self.journal.next_undo(), self.journal.undo, entry_id, skip_changed)

    def redo(self, entry_id: int | None = None, skip_changed: bool = False) -> Answer:
        """Make the change again that was undone last; as `undo`."""
        with self.journal.held():
            return self._turn(self.journal.next_redo(), self.journal.redo, entry_id, skip_changed)

    def _turn(self, entry: Entry | None, turn: Callable[[bool], Done | None], entry_id: int | None,
              skip_changed: bool) -> Answer:
        if entry is None or entry_id not in (None, entry.id):
            return {"done": None, **self.state()}
        try:
            done = turn(skip_changed)
        except Changed as error:
            return {"conflict": {"what": entry.what, "files": error.files}, **self.state()}
        if done:
            self._look_again(done)
        return {"done": entry.what, **self.state()}

    def change(self, what: str, changes: Sequence[Change]) -> Answer:
        """Make changes as one entry of the journal."""
        self._look_again(self.journal.do(what, changes))
        return self.state()

    def _look_again(self, done: Done) -> None:
        names = {change.name for change in done.changes}
        if all(isinstance(change, Write) and change.name.endswith(".txt") for change in done.changes):
            self.index.reread(names)
        else:
            self.index.refresh(at_once=True)

    def _card(self, record: Record) -> Answer:
        facts = record.facts
        return {"name": record.name, "caption": record.caption, "version": record.version, "fault": record.fault,
                "thumb": self._thumb(record), "width": facts.width if facts else 0,
                "height": facts.height if facts else 0, "repeats": record.repeats, "excluded": record.excluded,
                "trouble": facts.trouble if facts else "", "mask": record.mask,
                "modified": record.stamp[0] / 1e9}

    def _thumb(self, record: Record) -> str:
        if record.facts and record.facts.trouble:
            return ""
        target = self.index.workshop.file_of(record.path, record.stamp, SIDE)
        if target.exists():
            return target.as_posix()
        self.index.look_at(record, SOON)
        return ""


def _count(things: Sequence[object]) -> str:
    return "1 image" if len(things) == 1 else f"{len(things)} images"
