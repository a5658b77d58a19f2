"""CLIP as a text encoder: the tokenizer that comes with us, and prompts of any length encoded in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.families import clip_merges, open_clip
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
    from transformers import CLIPTextModel, CLIPTokenizer

VOCAB_SIZE = 49408  # of the tokenizer that comes with us
PLACES = 77  # tokens of a chunk of a prompt, start, end and padding included
_OWN_NAMES = ("embeddings.", "encoder.", "final_layer_norm.", "text_projection.")
# Where single files keep a CLIP-L: A1111 and ComfyUI checkpoints, ComfyUI's saved encoders.
PREFIXES = ("cond_stage_model.transformer.", "text_encoders.clip_l.transformer.", "clip_l.transformer.")


def load_tokenizer(folder: Path | None, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of a folder (tokenizer.json, or vocab.json and merges.txt); without one, OpenAI's with this `pad`.

    Raises UserError when the folder has no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    if folder is None:
        tokens, merges = clip_merges.vocabulary()
        return CLIPTokenizer(vocab=dict(tokens), merges=list(merges), model_max_length=PLACES, pad_token=pad)
    files = {file.name for file in folder.iterdir()}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise UserError(f"{folder} has no CLIP tokenizer: it needs tokenizer.json, or vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers' parser raises plain Exception
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None


def canonical(name: str) -> str:
    """A CLIP tensor's or module's name as `text_model.…`: transformers from 5.6 on leaves that word out."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def part_of(file: Path, tensors: Mapping[str, TensorInfo], prefixes: Sequence[str],
            template: Mapping[str, Any]) -> Part | None:
    """The CLIP that a file keeps under one of these prefixes, its config completed from shapes; None: it has none."""
    for prefix in prefixes:
        found = {
            canonical(name): info
            for name, info in without_prefix(tensors, prefix).items()
            if name.removeprefix("text_model.").startswith(_OWN_NAMES)
        }
        if "text_model.embeddings.token_embedding.weight" in found:
            return Part(file, text_config(found, template), found, "ldm")
    return None


def other_part(path: Path, name: str, prefixes: Sequence[str], template: Mapping[str, Any]) -> Part:
    """A CLIP given apart from its base as model.<name>, a folder or a file. Raises UserError if it is none."""
    return text_part(path, name, ["clip"], "CLIP",
                     lambda tensors: part_of(path, tensors, (*prefixes, ""), template))


def size(part: Part) -> tuple[str, int]:
    """What `parts.check_text` compares."""
    return "clip", part.config.get("hidden_size", 0)


def text_config(tensors: Mapping[str, TensorInfo], template: Mapping[str, Any]) -> dict[str, Any]:
    """`template` with the sizes that a CLIP text model's shapes tell (canonical names). Heads are 64 wide, as in all
    of CLIP's text models."""
    tokens = tensors["text_model.embeddings.token_embedding.weight"].shape
    width, projection = tokens[1], "text_model.text_projection.weight"
    return dict(template) | {
        "vocab_size": tokens[0],
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": count_numbered(tensors, r"text_model\.encoder\.layers\.(\d+)\."),
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "bos_token_id": tokens[0] - 2,
        "eos_token_id": tokens[0] - 1,
    } | ({"projection_dim": tensors[projection].shape[0]} if projection in tensors else {})


class ClipTextEncoder(nn.Module):
    """A CLIP text model with its tokenizer: prompts in, the hidden states that condition a UNet out."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, clip_skip: int = 1) -> None:
        super().__init__()
        self.model, self.tokenizer, self.clip_skip = model, tokenizer, clip_skip

    @property
    def body(self) -> nn.Module:
        """The module with `embeddings`, `encoder` and `final_layer_norm`, whatever transformers' version."""
        return getattr(self.model, "text_model", self.model)

    def chunks(self, prompt: str) -> list[list[int]]:
        """A prompt's tokens in chunks of the model's length (77), each with start, end and padding."""
        room = self.model.config.max_position_embeddings - 2
        tokens = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        pieces = [tokens[i : i + room] for i in range(0, len(tokens), room)] or [[]]
        start, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return [[start, *piece, end, *[pad] * (room - len(piece))] for piece in pieces]

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Tokens b k 77, with as many chunks k as the longest prompt has: the others end in the empty prompt's."""
        chunked = [self.chunks(prompt) for prompt in prompts]
        longest = max(len(chunks) for chunks in chunked)
        empty = self.chunks("")
        return torch.tensor([chunks + empty * (longest - len(chunks)) for chunks in chunked],
                            device=self.body.embeddings.token_embedding.weight.device)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Hidden states (b, 77 · chunks, d) in the model's dtype, after the final layer norm.

        Each chunk is encoded on its own and the chunks are joined, so that no prompt is cut. Prompts of one call have
        as many chunks as the longest of them: the others end in chunks of the empty prompt.
        """
        ids = self.ids(prompts).flatten(0, 1)  # b*k 77
        states = self.model(ids, output_hidden_states=True).hidden_states[-self.clip_skip]
        states = self.body.final_layer_norm(states)  # b*k 77 d
        return states.reshape(len(prompts), -1, states.shape[-1])


def load(part: Part, tokenizer_folder: Path | None, device: torch.device | str, dtype: torch.dtype,
         kind: str = "CLIPTextModel", pad: str = "<|endoftext|>",
         quantize: str = "none") -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A CLIP text model, of transformers' class `kind`, with its tokenizer. Raises UserError for damaged weights or
    tokenizer."""
    tokenizer = load_tokenizer(tokenizer_folder, pad)
    model = load_text_model(part, device, dtype, kind, quantize)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer_folder} has {len(tokenizer)} tokens and the text encoder "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return model, tokenizer


def load_text_model(part: Part, device: torch.device | str, dtype: torch.dtype,
                    kind: str = "CLIPTextModel", quantize: str = "none") -> CLIPTextModel:
    """A CLIP text model, frozen, from a part whose tensors have any of CLIP's namings."""
    import transformers

    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(part.config))
    tensors = mapped_tensors(part)
    tensors = open_clip.renamed(tensors) if part.layout == "open_clip" else tensors
    paths = {_module(canonical(name)): _module(name) for name in model.state_dict()}
    weights = {}
    for name, tensor in tensors.items():  # scales of fp8 weights go along
        path, ending = _module(canonical(name)), name.rpartition(".")[2]
        weights[f"{paths.get(path, path)}.{ending}"] = tensor
    return fill(model, weights, device, dtype, part.source, quantize)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
