"""A language model as a text encoder, as Flux.2 uses it: hidden states of three layers side by side."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.families.clip_merges import printable_bytes
from trainer.families.parts import text_part
from trainer.families.tensors import Part, TensorInfo, count_numbered, fill, mapped_tensors

if TYPE_CHECKING:  # imported when a text encoder is loaded: with cached texts none is, and it takes a second
    from transformers import PreTrainedTokenizerBase

PLACES = 512  # tokens of a prompt, padding included
LAYERS = {"qwen3": (9, 18, 27), "mistral": (10, 20, 30)}  # the hidden states that condition Flux.2
QWEN_VOCABULARY = (151643, 151936)  # tokens of the tokenizer that comes with us; rows of Qwen3's table
_QWEN_MERGES = Path(__file__).parent / "configs" / "qwen_merges.txt.gz"
_QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
# What Qwen3's own template makes of one message of a user, without thinking.
_QWEN_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                  "{% endfor %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}")
_MISTRAL_SYSTEM = ("You are an AI that reasons about image descriptions. You give structured responses focusing on "
                   "object relationships, object\nattribution and actions without speculation.")
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # of the layers, in the files there are


class LlmText(nn.Module):
    """Prompts in, hidden states b n 3d out: n is 512, or as many times that as the longest prompt needs."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.kind = model, tokenizer, kind

    def chunks(self, prompt: str) -> int:
        return -(-len(self.tokenizer(self.text(prompt), add_special_tokens=False, verbose=False).input_ids) // PLACES)

    def text(self, prompt: str) -> str:
        """The prompt as the conversation that the model was shown."""
        if self.kind == "qwen3":
            messages = [{"role": "user", "content": prompt}]
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                      enable_thinking=False)
        messages = [{"role": role, "content": [{"type": "text", "text": text}]}
                    for role, text in (("system", _MISTRAL_SYSTEM), ("user", prompt.replace("[IMG]", "")))]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        length = PLACES * max(self.chunks(prompt) for prompt in prompts)
        # Templates of Mistral write the beginning of text themselves; Qwen has none.
        inputs = self.tokenizer([self.text(prompt) for prompt in prompts], padding="max_length", max_length=length,
                                truncation=True, add_special_tokens=False, return_tensors="pt")
        device = self.model.embed_tokens.weight.device
        out = self.model(input_ids=inputs.input_ids.to(device), attention_mask=inputs.attention_mask.to(device),
                         output_hidden_states=True, use_cache=False)
        return torch.cat([out.hidden_states[layer] for layer in LAYERS[self.kind]], dim=-1)


@cache
def _bundled_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    lines = gzip.decompress(_QWEN_MERGES.read_bytes()).decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines]
    tokens = [*printable_bytes(), *("".join(merge) for merge in merges), *_QWEN_SPECIALS]
    return {token: number for number, token in enumerate(tokens)}, merges


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer, with the part of its chat template that prompts need."""
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _bundled_vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), eos_token="<|im_end|>",
                               pad_token="<|endoftext|>")
    tokenizer.add_tokens(list(_QWEN_SPECIALS), special_tokens=True)
    tokenizer.chat_template = _QWEN_TEMPLATE
    return tokenizer


def load_tokenizer(folder: Path | None, kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; without one, Qwen's, which comes with us. Raises UserError for a missing one."""
    if folder is None and kind == "qwen3":
        return qwen_tokenizer()
    if folder is None or not folder.is_dir():
        raise UserError(f"{'the' if folder is None else folder} tokenizer of the text encoder is missing: give a "
                        "folder with tokenizer.json as model.tokenizer, such as the folder tokenizer of a Flux.2 model")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers' parser raises plain Exception
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {folder} has no chat template: copy the whole tokenizer folder of the model")
    return tokenizer


def _names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names that the body of the model gives them."""
    for prefix in (*_PREFIXES, ""):
        if f"{prefix}embed_tokens.weight" in tensors:
            return {name[len(prefix):]: info for name, info in tensors.items() if name.startswith(prefix)}
    return {}


def part_of(file: Path, tensors: Mapping[str, TensorInfo], template: Callable[[str], dict[str, Any]]) -> Part | None:
    """The language model that a file keeps, its config completed from shapes; None: it has none."""
    inner = {name.split(".transformer.", 1)[-1] if name.startswith("text_encoders.") else name: info
             for name, info in tensors.items()}
    found = _names(inner)
    if "layers.0.self_attn.k_proj.weight" not in found:
        return None
    kind = "qwen3" if "layers.0.self_attn.q_norm.weight" in found else "mistral"
    head = found["layers.0.self_attn.q_norm.weight"].shape[0] if kind == "qwen3" else template(kind)["head_dim"]
    vocabulary, width = found["embed_tokens.weight"].shape
    config = template(kind) | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "head_dim": head,
        "num_attention_heads": found["layers.0.self_attn.q_proj.weight"].shape[0] // head,
        "num_key_value_heads": found["layers.0.self_attn.k_proj.weight"].shape[0] // head,
        "intermediate_size": found["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": count_numbered(found, r"layers\.(\d+)\."),
    }
    return Part(file, config, found, "hf")


def other_part(path: Path, template: Callable[[str], dict[str, Any]]) -> Part:
    """A language model given apart from its base as model.text_encoder, a folder or a file."""
    return text_part(path, "text_encoder", ["qwen3", "mistral"], "Qwen3 or Mistral",
                     lambda tensors: part_of(path, tensors, template))


def body_config(part: Part) -> dict[str, Any]:
    """The config of the language model itself, which Mistral's vision model keeps inside its own."""
    return part.config.get("text_config", part.config)


def kind_of(part: Part) -> str:
    return "qwen3" if "qwen3" in body_config(part).get("model_type", "") else "mistral"


def load(part: Part, tokenizer: Path | None, device: torch.device | str, dtype: torch.dtype,
         quantize: str = "none") -> LlmText:
    """The model up to the last layer that is needed, on `device`, frozen, with its tokenizer."""
    import transformers

    kind, config = kind_of(part), body_config(part)
    needed = LAYERS[kind][-1]
    if config["num_hidden_layers"] < needed:
        raise UserError(f"the text encoder of {part.source} has {config['num_hidden_layers']} layers, and Flux.2 "
                        f"needs {needed}: choose another model.text_encoder")
    words = load_tokenizer(tokenizer, kind)
    name = {"qwen3": "Qwen3", "mistral": "Mistral"}[kind]
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config").from_dict(config))
    if config["num_hidden_layers"] > needed:
        model.layers, model.norm = model.layers[:needed], nn.Identity()  # the norm is for the last layer alone
    model = fill(model, _names(mapped_tensors(part)), device, dtype, part.source, quantize)
    return LlmText(model, words, kind).eval()
