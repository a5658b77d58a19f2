"""Says word by word what is between two captions, for a preview."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
LONGEST = 2000  # words; longer captions are compared as a whole

Span = tuple[str, str]


def spans(before: str, after: str) -> list[Span]:
    """Pieces of both texts in order: ("=", text) in both, ("-", text) only before, ("+", text) only after."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if len(old) + len(new) > LONGEST:
        return [("-", before), ("+", after)]
    found: list[Span] = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("=", "".join(old[a:b])))
            continue
        found += [(sign, "".join(words)) for sign, words in (("-", old[a:b]), ("+", new[c:d])) if words]
    return found
