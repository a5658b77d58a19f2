"""A CLIP tokenizer whose merges are learned from the emoji's captions."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_TOKENS = 77
_VOCABULARY = 5632
_SPECIALS = ["<|startoftext|>", "<|endoftext|>"]
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's


def _learn_merges(captions: list[str], letters: list[str]) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(letters),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Tokens in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(captions, letters)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), *_SPECIALS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`tokenizer.json`, and `vocab.json` with `merges.txt` for programs that read CLIP's older files."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
