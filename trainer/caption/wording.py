"""Turns what a captioner says into the caption that is proposed: prefix, and how new text joins the old."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from trainer.captions import join_tags, split_tags

Mode = Literal["missing", "replace", "append"]


def propose(before: str, said: str, *, mode: Mode, prefix: str, tags: bool) -> str:
    """The caption after; `said` is one line of text, or tags parted by commas.

    Tags that the caption already has are not put in twice, and a sentence is set apart from what stood before it.
    """
    said = " ".join(said.split())
    if mode != "append" or not before.strip():
        return with_prefix(said, prefix)
    if tags:
        old = split_tags(before)
        known = {_plain(tag) for tag in old}
        new = [tag for tag in split_tags(said) if _plain(tag) not in known]
        joined = join_tags([before.strip().rstrip(","), *new])
    else:
        before = before.strip()
        joined = before + (" " if before[-1] in ".!?" else ", ") + said
    return with_prefix(joined, prefix)


def with_prefix(text: str, prefix: str) -> str:
    """The prefix in front, with a comma after it unless it ends in a mark of its own; never twice."""
    prefix = prefix.strip()
    if not prefix or text.startswith(prefix):
        return text
    if not text:
        return prefix
    return prefix + (" " if prefix[-1] in ",.:;!?-" else ", ") + text


def without(tags: Collection[str], blacklist: Collection[str]) -> list[str]:
    """The tags that are not on the list; case, and blanks or underscores between words, do not count."""
    barred = {_plain(tag) for tag in blacklist}
    return [tag for tag in tags if _plain(tag) not in barred]


def _plain(tag: str) -> str:
    return " ".join(tag.replace("_", " ").split()).casefold()
