"""Counts CLIP's tokens in a caption, and says where its limit of 77 falls, without torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from trainer.families import clip_merges

LIMIT = 77  # with a start and an end; what is longer is encoded in further pieces
_LOCK = threading.Lock()


def count(texts: Sequence[str]) -> list[tuple[int, int | None]]:
    """Tokens of each text, with start and end, and the character at which the limit falls (None: it does not)."""
    with _LOCK:
        tokenizer = _tokenizer()
    encoded = tokenizer.encode_batch([text.strip() for text in texts])
    answers: list[tuple[int, int | None]] = []
    for text, tokens in zip(texts, encoded):
        tokens_and_ends = len(tokens.ids) + 2
        lead = len(text) - len(text.lstrip())
        answers.append((tokens_and_ends, lead + tokens.offsets[LIMIT - 2][0] if tokens_and_ends > LIMIT else None))
    return answers


@cache
def _tokenizer() -> Any:
    """OpenAI's byte-level BPE of CLIP, from the merges that come with us."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary, merges = clip_merges.vocabulary()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
