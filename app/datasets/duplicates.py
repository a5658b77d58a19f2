"""Finds images that are the same, or look the same."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence

from app.datasets.index import Record

NEAR_BITS = 8  # of 64, by which the perceptual hashes of near-duplicates differ at most
NEAR_COLOUR = 12.0  # of 255, by which their tiny pictures differ at most, on average
_ROWS = 256  # compared at once with all others


def same(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of images whose files have the same bytes."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.facts and record.facts.sha256:
            groups[record.facts.sha256].append(record)
    return [group for group in groups.values() if len(group) > 1]


def similar(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of images that look nearly the same and are not the same file."""
    import numpy as np

    distinct = list({record.facts.sha256: record for record in records if record.facts and record.facts.hash}.values())
    facts = [record.facts for record in distinct if record.facts]
    hashes = np.array([int(fact.hash, 16) for fact in facts], dtype=np.uint64)
    group_of = list(range(len(distinct)))
    for start in range(0, len(distinct), _ROWS):
        bits = np.bitwise_count(hashes[start:start + _ROWS, None] ^ hashes[None, :])  # rows n
        for row, other in zip(*np.nonzero(bits <= NEAR_BITS)):
            first, second = start + int(row), int(other)
            if first < second and _find(group_of, first) != _find(group_of, second) and _colours_are_near(
                    facts[first].patch, facts[second].patch):
                group_of[_find(group_of, second)] = _find(group_of, first)
    groups: dict[int, list[Record]] = defaultdict(list)
    for i, record in enumerate(distinct):
        groups[_find(group_of, i)].append(record)
    return [group for group in groups.values() if len(group) > 1]


def best(group: Sequence[Record]) -> Record:
    """The one to keep: not excluded, the most pixels, the longest caption, the first name."""
    return min(group, key=lambda record: (record.excluded, -record.pixels, -len(record.caption.strip()), record.name))


def _find(group_of: list[int], i: int) -> int:
    """The first of i's group."""
    while group_of[i] != i:
        group_of[i] = group_of[group_of[i]]
        i = group_of[i]
    return i


def _colours_are_near(one: str, other: str) -> bool:
    import numpy as np

    a, b = (np.frombuffer(base64.b64decode(patch), dtype=np.uint8).astype(np.int16) for patch in (one, other))
    return float(np.abs(a - b).mean()) <= NEAR_COLOUR
