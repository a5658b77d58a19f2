"""What can be done to many captions at once: each operation is a function from text to text and count of places."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import regex
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer import captions
from trainer.errors import UserError

PATIENCE = 2.0  # seconds for one regular expression over all captions
LONGEST = 1_000_000  # characters that a caption may grow to

Text = Annotated[str, Field(max_length=20_000)]
Tag = Annotated[str, Field(min_length=1, max_length=2000)]


class Edited(NamedTuple):
    text: str
    hits: int  # places


Edit = Callable[[str], Edited]


class _Operation(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Replace(_Operation):
    """Find and replace: plain text, whole tags, or a regular expression."""

    kind: Literal["replace"]
    find: Annotated[str, Field(min_length=1, max_length=2000)]
    replace: Text = ""
    mode: Literal["plain", "tag", "regex"] = "plain"
    case: bool = False

    def what(self) -> str:
        return f"replace {_short(self.find)} by {_short(self.replace)}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        if self.mode == "tag":
            return _for_tags(lambda tag: self.replace if _same(tag, self.find, self.case) else tag)
        flags = 0 if self.case else regex.IGNORECASE
        pattern = _compiled(self.find if self.mode == "regex" else regex.escape(self.find), flags)
        template: Any = self.replace if self.mode == "regex" else lambda match: self.replace
        deadline = time.monotonic() + PATIENCE

        def edit(text: str) -> Edited:
            try:
                left = max(0.001, deadline - time.monotonic())
                return Edited(*pattern.subn(template, text, timeout=left, concurrent=True))
            except TimeoutError:
                raise UserError(f"the expression {_short(self.find)} takes too long (over {PATIENCE:.0f} seconds); "
                                "nested repeats such as (a+)+ are the usual cause: write it more simply") from None
            except (regex.error, IndexError) as error:
                raise UserError(f"the replacement {_short(self.replace)} is not valid: {error}") from None

        return edit


class Add(_Operation):
    """Put a text before or behind every caption."""

    kind: Literal["add"]
    text: Annotated[str, Field(min_length=1, max_length=20_000)]
    where: Literal["before", "after"] = "before"
    joiner: Annotated[str, Field(max_length=20)] = ", "
    skip_present: bool = True

    def what(self) -> str:
        return f"add {_short(self.text)} {'before' if self.where == 'before' else 'behind'}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        def edit(text: str) -> Edited:
            if self.skip_present and _has_words(text, self.text):
                return Edited(text, 0)
            lead, body, tail = _parts(text)
            joined = [self.text, body] if self.where == "before" else [body, self.text]
            return Edited(lead + (self.joiner.join(joined) if body else self.text) + tail, 1)

        return edit


class RemoveTags(_Operation):
    """Take tags out."""

    kind: Literal["remove_tags"]
    tags: Annotated[list[Tag], Field(min_length=1, max_length=1000)]

    def what(self) -> str:
        return f"remove {_short(', '.join(self.tags))}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        gone = {_folded(tag) for tag in self.tags}
        return _for_tags(lambda tag: "" if _folded(tag) in gone else tag)


class RenameTag(_Operation):
    """Call a tag otherwise; where a caption has the new one already, the old one goes."""

    kind: Literal["rename_tag"]
    tag: Tag
    to: Tag

    def what(self) -> str:
        return f"rename {_short(self.tag)} to {_short(self.to)}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        rename = _for_tags(lambda tag: self.to.strip() if _folded(tag) == _folded(self.tag) else tag)

        def edit(text: str) -> Edited:
            renamed = rename(text)
            return Edited(_without_repeats(renamed.text, self.to).text, renamed.hits) if renamed.hits else renamed

        return edit


class SortTags(_Operation):
    """Put the tags of each line in order."""

    kind: Literal["sort_tags"]
    order: Literal["alphabet", "frequency"] = "alphabet"
    keep: Annotated[int, Field(ge=0, le=100)] = 0  # first tags that stay in place

    def what(self) -> str:
        return f"sort tags by {self.order}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        by_folded = {_folded(tag): count for tag, count in counts.items()} if self.order == "frequency" else {}

        def rank(tag: str) -> tuple[int, str, str]:
            return -by_folded.get(_folded(tag), 0), _folded(tag), tag

        def sort_line(line: str) -> str:
            tags = [tag for piece in line.split(",") if (tag := piece.strip())]
            ordered = tags[:self.keep] + sorted(tags[self.keep:], key=rank)
            return line if ordered == tags else ", ".join(ordered)

        def edit(text: str) -> Edited:
            lead, body, tail = _parts(text)
            new = lead + "\n".join(sort_line(line) for line in body.split("\n")) + tail
            return Edited(new, int(new != text))

        return edit


class RemoveDuplicates(_Operation):
    """Of equal tags in a caption keep the first."""

    kind: Literal["remove_duplicates"]

    def what(self) -> str:
        return "remove repeated tags"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        return _without_repeats


class Trigger(_Operation):
    """Put the trigger word first in every caption that does not have it; a former one is replaced by it."""

    kind: Literal["trigger"]
    word: Tag
    old: Annotated[str, Field(max_length=2000)] = ""

    def what(self) -> str:
        return f"set trigger word {_short(self.word)}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        word = self.word.strip()

        def edit(text: str) -> Edited:
            new, hits = text, 0
            if self.old.strip():
                former = re.compile(rf"(?<!\w){re.escape(self.old.strip())}(?!\w)", re.IGNORECASE)
                new, hits = former.subn(lambda match: word, text)
                new = _without_repeats(new, word).text if hits else new
            lead, body, tail = _parts(new)
            if not _has_words(body, word):
                new, hits = lead + (f"{word}, {body}" if body else word) + tail, hits + 1
            return Edited(new, hits)

        return edit


class Separator(_Operation):
    """Part the tags by something else."""

    kind: Literal["separator"]
    old: Annotated[str, Field(min_length=1, max_length=20)]
    new: Annotated[str, Field(min_length=1, max_length=20)]

    def what(self) -> str:
        return f"separate by {_short(self.new)} and no longer by {_short(self.old)}"

    def editor(self, counts: Mapping[str, int]) -> Edit:
        joiner = self.new if not self.new.strip() else self.new.strip() + " "

        def edit(text: str) -> Edited:
            lead, body, tail = _parts(text)
            pieces = body.split(self.old)
            if len(pieces) == 1 or self.old == self.new:
                return Edited(text, 0)
            return Edited(lead + joiner.join(tag for piece in pieces if (tag := piece.strip())) + tail, len(pieces) - 1)

        return edit


Operation = Annotated[Replace | Add | RemoveTags | RenameTag | SortTags | RemoveDuplicates | Trigger | Separator,
                      Field(discriminator="kind")]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Operation)


def parse(data: object) -> Operation:
    """An operation as the browser sends it.  Raises `UserError` that names what is wrong."""
    try:
        operation: Operation = _ADAPTER.validate_python(data)
    except ValidationError as error:
        raise UserError("; ".join(_fault(item) for item in error.errors()[:3])) from None
    operation.editor({})  # an expression that is none is told here
    return operation


def _fault(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"][1:]) or "operation"
    if item["type"] in ("string_too_short", "too_short", "missing"):
        return f"{field}: is empty; say what it shall be"
    return f"{field}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _compiled(pattern: str, flags: int) -> Any:
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise UserError(f"the expression {_short(pattern)} is not valid: {error}") from None


def _for_tags(change: Callable[[str], str]) -> Edit:
    """Edit tag by tag, commas and lines apart; a tag changed to "" goes, with its comma; all else stays as it is."""

    def edit_line(line: str) -> Edited:
        pieces, hits = [], 0
        for piece in line.split(","):
            tag = piece.strip()
            new = change(tag) if tag else tag
            hits += new != tag
            if new or not tag:
                pieces.append(piece if new == tag else piece.replace(tag, new))
        if hits and pieces:
            pieces[0] = pieces[0].lstrip() if not line[:1].isspace() else pieces[0]
        return Edited(",".join(pieces), hits)

    return _by_lines(edit_line)


def _without_repeats(text: str, only: str = "") -> Edited:
    """The later ones of equal tags taken out, of all tags or of one."""
    seen: set[str] = set()

    def change(tag: str) -> str:
        key = _folded(tag)
        if key in seen and (not only or key == _folded(only)):
            return ""
        seen.add(key)
        return tag

    return _for_tags(change)(text)


def _by_lines(edit_line: Edit) -> Edit:
    """Edit each line; one that is emptied goes."""

    def edit(text: str) -> Edited:
        lines, hits = [], 0
        for line in text.split("\n"):
            new = edit_line(line)
            hits += new.hits
            if new.text.strip() or not line.strip():
                lines.append(new.text)
        return Edited("\n".join(lines), hits)

    return edit


def _parts(text: str) -> tuple[str, str, str]:
    """White space before, the text, white space behind."""
    body = text.strip()
    if not body:
        return "", "", text
    start = text.index(body)
    return text[:start], body, text[start + len(body):]


def _has_words(text: str, words: str) -> bool:
    return bool(words.strip()) and captions.has_words(text, words.strip())


def _same(tag: str, other: str, case: bool) -> bool:
    return tag == other.strip() if case else _folded(tag) == _folded(other)


def _folded(tag: str) -> str:
    return tag.strip().casefold()


def _short(text: str) -> str:
    shown = text if len(text) <= 40 else text[:39] + "…"
    return f'"{shown}"'
