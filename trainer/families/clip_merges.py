"""OpenAI's vocabulary of CLIP, from the merges that come with us; without torch, so that the app can count tokens."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

_MERGES = Path(__file__).parent / "configs" / "clip_merges.txt.gz"


def printable_bytes() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE, in the order of OpenAI's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their numbers, and the merges that make them."""
    lines = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    letters = printable_bytes()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(merge) for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: number for number, token in enumerate(tokens)}, merges
