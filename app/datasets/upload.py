"""Takes files into a data set: safe names, nothing overwritten unasked, and zips that cannot break out or blow up."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app.datasets import trash
from app.datasets.arrange import free_stem, relisted, safe_name
from app.datasets.changes import Change, Move, Write, content, end_of
from app.datasets.index import LONGEST, Record
from app.datasets.journal import HIDDEN
from trainer.data import folders
from trainer.data.images import UNSUPPORTED, ImageError, inspect
from trainer.errors import UserError
from trainer.files import MAY_SYNC_AT_ONCE

MOST_MEMBERS = 50_000  # files of a zip
MOST_RATIO = 100  # unpacked to packed; pictures hardly shrink at all
FREE_RATIO = 50_000_000  # bytes that a zip may unpack to whatever the ratio
LONGEST_PATH = 900  # letters of a name with its folders; in the trash more come before it


@dataclass
class Batch:
    """Files that came, as copies in the data set's hidden folder."""

    draft: Path  # the folder of the copies
    files: dict[str, Path] = field(default_factory=dict)  # wanted name -> copy
    came_as: dict[str, str] = field(default_factory=dict)  # wanted name -> the name it came with
    refused: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Plan:
    """What taking a batch in means."""

    changes: list[Change] = field(default_factory=list)
    images: int = 0
    captions: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    ends: set[str] = field(default_factory=set)  # of the changes

    def add(self, change: Change) -> None:
        self.changes.append(change)
        self.ends.add(end_of(change))

    def what(self) -> str:
        parts = [f"{count} {word}{'s' * (count != 1)}" for count, word in
                 ((self.images, "image"), (self.captions, "caption")) if count]
        return f"add {' and '.join(parts) or 'files'}"


@contextmanager
def staged(root: Path, files: Sequence[tuple[str, Path]]) -> Iterator[Batch]:
    """Copies of the files, and of what zips among them hold, all on the disk; what is left of them is removed."""
    try:
        (root / HIDDEN).mkdir(exist_ok=True)
        batch = Batch(draft := Path(tempfile.mkdtemp(prefix=trash.INCOMING, dir=root / HIDDEN)))
    except OSError as error:
        raise UserError(f"{root} cannot be written ({error.strerror}); copy the data set into the workspace to "
                        "change it") from None
    try:
        for name, source in files:
            if name.lower().endswith(".zip"):
                _unpack(name, source, draft, batch)
            elif target := _target(name, draft, batch, name):
                shutil.copyfile(source, target)
        if batch.files and MAY_SYNC_AT_ONCE:
            os.sync()
        yield batch
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def in_trash(root: Path, batch: Batch) -> Iterator[None]:
    """While the data set is held, its trash has the copies: files move from there to their places, and back by undo.

    Not before, as others see what is in the trash, and may empty it.
    """
    folder = root / trash.new_folder()
    try:
        if batch.files:
            folder.parent.mkdir(exist_ok=True)
            batch.draft.rename(folder)
            batch.files = {name: folder / path.relative_to(batch.draft) for name, path in batch.files.items()}
        yield
    finally:
        _clear(folder, batch)


def plan(root: Path, batch: Batch, records: Sequence[Record], excluded: Collection[str] = ()) -> Plan:
    """Where each file goes: an image whose name is taken gets a number, with its caption; a caption that comes for an
    image that is there takes the place of its present one.  `excluded` has the names that images came with."""
    result = Plan(refused=batch.refused)
    taken = {name.casefold() for record in records for name in (record.name, record.sidecar, record.mask_name)}
    taken |= {name.casefold() for name in batch.files if not _is_image(name) and _is_other(root, batch, name)}
    known = {record.sidecar for record in records}
    hashes: dict[str, list[str]] = {}  # -> the images of that content
    for record in records:
        if record.facts and record.facts.sha256:
            hashes.setdefault(record.facts.sha256, []).append(record.name)
    stems: dict[str, str] = {}  # of images that came -> the stem that they get
    listed: dict[str, set[str]] = {}  # folder -> the excluded ones of it
    without: dict[str, str] = {}  # folded stem of an image that was refused -> what it came as
    for name, path in batch.files.items():
        if _is_image(name):
            stem, suffix = os.path.splitext(name)
            same, reason = _fault(name, path, hashes)
            if reason:
                result.refused.append((batch.came_as[name], reason))
                if stem.casefold() not in {os.path.splitext(other)[0].casefold() for other in same}:
                    without[stem.casefold()] = batch.came_as[name]
                continue
            if stem not in stems:
                stems[stem] = free_stem(stem, (suffix, ".txt", folders.MASK), taken)
            new = stems[stem] + suffix
            if new.casefold() in taken:  # a.png and a.jpg came, and one of them is there
                new = free_stem(stem, (suffix, ".txt", folders.MASK), taken) + suffix
            taken.add(new.casefold())
            result.add(Move(_inside(root, path), new))
            result.images += 1
            if batch.came_as[name] in excluded:
                folder, _, file = new.rpartition("/")
                listed.setdefault(folder, set()).add(file)
    for name in batch.files:
        if _is_image(name):
            continue
        stem = name[:-len(_ending(name))]
        if stem not in stems and stem.casefold() in without:
            result.refused.append((batch.came_as[name], f"belongs to {without[stem.casefold()]}, which was not taken"))
        else:
            _plan_companion(root, batch, name, stems, known, result)
    for change in relisted(root, listed, True):
        result.add(change)
    return result


def _plan_companion(root: Path, batch: Batch, name: str, stems: dict[str, str], known: set[str], result: Plan) -> None:
    """A caption or a mask: with the image that came along, or for one that is there, or by itself."""
    path, ending = batch.files[name], _ending(name)
    stem = name[:-len(ending)]
    target = stems.get(stem, stem) + ending
    try:
        before, after = content(root, target), path.read_bytes()
    except UserError as error:
        result.refused.append((batch.came_as[name], str(error)))
        return
    if ending == ".txt" and (size := len(after)) > LONGEST:
        result.refused.append((batch.came_as[name], f"has {size} bytes; the most for a caption is {LONGEST}"))
    elif target in result.ends or before not in (None, after) and stem in stems and target not in known:
        result.refused.append((batch.came_as[name], f"there is a {target} already"))
    elif before is None:
        result.add(Move(_inside(root, path), target))
        result.captions += ending == ".txt"
    elif before != after:
        result.add(Write(target, before, after))
        result.captions += ending == ".txt"


def _is_other(root: Path, batch: Batch, name: str) -> bool:
    """Whether a caption or mask that came finds another one under its name, which may be no image's."""
    try:
        return content(root, name) not in (None, batch.files[name].read_bytes())
    except UserError:  # a folder, or not ours to read
        return True


def _unpack(name: str, source: Path, draft: Path, batch: Batch) -> None:
    """A zip's images, captions and masks, in its own folders."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if reason := _refusal(members, source, draft):
                batch.refused.append((name, reason))
                return
            for member in members:
                if stat.S_ISLNK(member.external_attr >> 16) or member.filename.startswith("__MACOSX/"):
                    continue
                if target := _target(member.filename, draft, batch, f"{name}: {member.filename}"):
                    with archive.open(member) as packed, open(target, "wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)  # zipfile stops at the size that it was told
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zipfile.zlib.error) as error:
        batch.refused.append((name, f"cannot be unpacked: {str(error)[:200] or 'it is broken'}"))


def _refusal(members: Sequence[zipfile.ZipInfo], source: Path, draft: Path) -> str:
    """Why a zip is not unpacked at all; "" when it is."""
    size = sum(member.file_size for member in members)
    if any(member.flag_bits & 1 for member in members):
        return "has a password; unpack it yourself and upload the files"
    if len(members) > MOST_MEMBERS:
        return f"holds {len(members)} files; the most is {MOST_MEMBERS}"
    if size > max(FREE_RATIO, MOST_RATIO * source.stat().st_size):
        return "unpacks to over a hundred times its size, as no pictures do"
    if size > shutil.disk_usage(draft).free * 0.9:
        return f"needs {size / 1e9:.1f} GB of disk, more than is free"
    return ""


def _target(name: str, draft: Path, batch: Batch, shown: str) -> Path | None:
    """Where a file is copied to; None when it is not one for a data set."""
    parts = [safe_name(part) for part in name.replace("\\", "/").split("/")]
    if "" in parts or ".." in name.replace("\\", "/").split("/"):
        batch.refused.append((shown, "its name leads out of the data set, or is hidden"))
        return None
    wanted = "/".join(parts)
    if len(wanted) > LONGEST_PATH:
        batch.refused.append((shown, f"its name has over {LONGEST_PATH} letters with its folders; shorten them"))
        return None
    target = draft / wanted
    is_known = folders.is_image(parts[-1]) or folders.is_mask(wanted) or wanted.lower().endswith(".txt")
    if not is_known or target.exists():
        batch.refused.append((shown, "came twice" if is_known else "is no image, caption (.txt) or mask"))
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a folder in a zip that is called as a file in it
        batch.refused.append((shown, f"cannot be stored ({error.strerror}); rename it or its folder"))
        return None
    batch.files[wanted], batch.came_as[wanted] = target, shown
    return target


def _ending(name: str) -> str:
    return folders.MASK if folders.is_mask(name) else ".txt"


def _fault(name: str, path: Path, hashes: dict[str, list[str]]) -> tuple[list[str], str]:
    """The images that are the same, and why one is not taken ("" when it is); remembers those that are."""
    if path.suffix.lower() in UNSUPPORTED:
        return [], ""  # the health check says what to do with it
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest in hashes:
        return hashes[digest], f"is the same picture as {hashes[digest][0]}"
    try:
        inspect(data)
    except ImageError as error:
        return [], str(error)
    hashes[digest] = [name]
    return [], ""


def _is_image(name: str) -> bool:
    return folders.is_image(name.rpartition("/")[2])


def _inside(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _clear(folder: Path, batch: Batch) -> None:
    """Remove copies that were not moved to a place."""
    for path in batch.files.values():
        path.unlink(missing_ok=True)
    for parent, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(parent):
            os.rmdir(parent)
