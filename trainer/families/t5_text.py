"""T5's encoder as Flux.1 uses it: 512 (schnell: 256) places of hidden states, padding included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.families.parts import text_part
from trainer.families.tensors import (
    Part,
    TensorInfo,
    count_numbered,
    fill,
    mapped_tensors,
    without_prefix,
)

if TYPE_CHECKING:  # imported when a text encoder is loaded: with cached texts none is, and it takes a second
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

PREFIXES = ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.")
_TOKENIZER_FILES = {"tokenizer.json", "spiece.model"}


class T5Text(nn.Module):
    """Prompts in, hidden states b n d out: n is `places`, or as many times that as the longest prompt needs."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, places: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.places = model, tokenizer, places

    def chunks(self, prompt: str) -> int:
        return -(-len(self.tokenizer(prompt, verbose=False).input_ids) // self.places)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        length = self.places * max(self.chunks(prompt) for prompt in prompts)
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True,
                             return_tensors="pt").input_ids
        return self.model(ids.to(self.model.shared.weight.device)).last_hidden_state


def part_of(file: Path, tensors: Mapping[str, TensorInfo], template: Mapping[str, Any]) -> Part | None:
    """The T5 that a file keeps, its config completed from shapes; None: it has none."""
    for prefix in (*PREFIXES, ""):
        found = without_prefix(tensors, prefix)
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        if name in found and "shared.weight" in found:
            heads = found[name].shape[1]
            config = dict(template) | {
                "vocab_size": found["shared.weight"].shape[0],
                "d_model": found["shared.weight"].shape[1],
                "num_heads": heads,
                "d_kv": found["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
                "d_ff": found["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
                "num_layers": count_numbered(found, r"encoder\.block\.(\d+)\."),
            }
            return Part(file, config, {key: info for key, info in found.items() if _own(key)}, "hf")
    return None


def _own(name: str) -> bool:
    return name.startswith(("encoder.", "shared."))


def other_part(path: Path, template: Mapping[str, Any]) -> Part:
    """A T5 given apart from its base as model.text_encoder_2, a folder or a file. Raises UserError if it is none."""
    return text_part(path, "text_encoder_2", ["t5"], "T5", lambda tensors: part_of(path, tensors, template))


def check_tokenizer(folder: Path | None) -> None:
    """Raise UserError unless the folder has T5's tokenizer, which does not come with us."""
    if folder is None or not folder.is_dir() or not _TOKENIZER_FILES & {file.name for file in folder.iterdir()}:
        raise UserError(
            f"T5's tokenizer is missing{f' in {folder}' if folder else ''}: give a folder with tokenizer.json or "
            "spiece.model as model.tokenizer_2, such as the folder tokenizer_2 of a Flux.1 model, or a hub id"
        )


def load_tokenizer(folder: Path | None) -> PreTrainedTokenizerBase:
    """T5's tokenizer of a folder. Raises UserError when there is none."""
    check_tokenizer(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load(part: Part, tokenizer: Path | None, places: int, device: torch.device | str, dtype: torch.dtype,
         quantize: str = "none") -> T5Text:
    """The encoder with its tokenizer on `device`, frozen. Raises UserError for damaged weights or no tokenizer."""
    from transformers import T5Config, T5EncoderModel

    words = load_tokenizer(tokenizer)
    with init_empty_weights(include_buffers=False):
        model = T5EncoderModel(T5Config.from_dict(part.config))
    tensors = mapped_tensors(part)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] = _embedding(tensors, part)
    model = fill(model, tensors, device, dtype, part.source, quantize)
    model.encoder.embed_tokens.weight = model.shared.weight  # one table, held once
    return T5Text(model, words, places).eval()


def _embedding(tensors: Mapping[str, Tensor], part: Part) -> Tensor:
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if name in tensors:
            return tensors[name]
    raise UserError(f"{part.source} lacks T5's table of tokens: the file is damaged. Download it again")
