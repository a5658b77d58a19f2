"""Captions beside images: read, write, and how one becomes the caption that a step trains on."""

from __future__ import annotations

import codecs
import hashlib
import math
import random
import re
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import UserError
from trainer.files import write_atomic


def sidecar(image: Path) -> Path:
    """Where the caption of an image stands: the same name with .txt."""
    return image.with_suffix(".txt")


def read(path: Path) -> str:
    """A caption's text, trimmed at both ends, lines parted by "\\n"; "" when there is no file.

    UTF-8 with or without byte order mark.  Raises `UserError` for any other encoding.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: the caption cannot be read: {error.strerror}") from None
    return _clean(decode(data, path))


def decode(data: bytes, path: Path) -> str:
    """A caption file's whole text, nothing trimmed, lines parted by "\\n".  Raises `UserError` as `read` does."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the caption is not UTF-8 text (byte {error.start}); "
                        "save it as UTF-8") from None
    if "\0" in text:  # UTF-16 of plain letters decodes as UTF-8 with zeros in between
        raise UserError(f"{path}: the caption is not UTF-8 text (it holds zero bytes); save it as UTF-8")
    return _plain_lines(text)


def encode(text: str, like: bytes = b"") -> bytes:
    """The bytes of a caption file with this text: nothing trimmed, byte order mark and line ends as in `like`.

    Raises `UserError` for what no caption can hold.
    """
    try:
        data = _plain_lines(text).encode()
    except UnicodeEncodeError:
        raise UserError("the caption holds half of a character; take it out") from None
    if b"\0" in data:
        raise UserError("a caption cannot hold a zero character; take it out")
    mark = codecs.BOM_UTF8 if like.startswith(codecs.BOM_UTF8) else b""
    return mark + data.replace(b"\n", _line_end(like))


def version(data: bytes | None) -> str:
    """Tells one content of a caption file from another; None is no file."""
    return "none" if data is None else hashlib.sha256(data).hexdigest()[:16]


def write(path: Path, text: str) -> bool:
    """Put `text` into the caption file, atomically, only when that changes what `read` gives; True if it did.

    A file that cannot be read is never overwritten: nobody has seen what it says.  Raises `UserError`.
    """
    if read(path) == _clean(text):
        return False
    write_atomic(path, _clean(text).encode())
    return True


def split_tags(text: str) -> list[str]:
    """The comma-separated tags of a caption, trimmed, without empty ones."""
    return [tag for tag in (part.strip() for part in text.split(",")) if tag]


def join_tags(tags: Iterable[str]) -> str:
    return ", ".join(tags)


def has_words(text: str, words: str) -> bool:
    """Whether a caption has these words as whole ones ("cat" is not in "cathedral"), whatever their case: to CLIP
    it does not count."""
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def training_caption(text: str, *, trigger: str, shuffle_tags: bool, keep_tags: int,
                     rng: random.Random) -> str:
    """What a step trains on: the trigger word in front unless the text has it, and the tags shuffled.

    `keep_tags` first tags stay in place; the trigger word, once put in front, is one of them.
    """
    text = _with_trigger(_clean(text), trigger.strip())
    if not shuffle_tags:
        return text
    tags = split_tags(text)
    rest = tags[keep_tags:]
    rng.shuffle(rest)
    return join_tags(tags[:keep_tags] + rest)


def variants(text: str, *, trigger: str, shuffle_tags: bool, keep_tags: int, count: int,
             seed: int) -> list[str]:
    """`count` training captions of one text, distinct as far as its tags allow (then they repeat in turn).

    A function of its arguments alone, so that what is cached for them never grows old.
    """
    rng = random.Random(hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest())
    movable = len(split_tags(_with_trigger(_clean(text), trigger.strip()))) - keep_tags if shuffle_tags else 1
    wanted = min(count, math.factorial(min(max(movable, 1), 10)))
    found: dict[str, None] = {}
    for _ in range(50 * count):  # equal tags make fewer orders than the factorial says: never search for ever
        found[training_caption(text, trigger=trigger, shuffle_tags=shuffle_tags, keep_tags=keep_tags,
                               rng=rng)] = None
        if len(found) == wanted:
            break
    distinct = list(found)
    return [distinct[i % len(distinct)] for i in range(count)]


def _clean(text: str) -> str:
    return _plain_lines(text).strip()


def _plain_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line_end(data: bytes) -> bytes:
    """What most lines of a file end with."""
    windows, old_mac, unix = data.count(b"\r\n"), data.count(b"\r"), data.count(b"\n")
    if windows > unix - windows:
        return b"\r\n"
    return b"\r" if old_mac > unix else b"\n"


def _with_trigger(text: str, trigger: str) -> str:
    if not trigger or has_words(text, trigger):
        return text
    return join_tags([trigger, text] if text else [trigger])
