"""Tiny captioners with the true topology of each kind, random weights, in the folders that people have."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

WIDTH = 32


def _bytes(special: list[str], **roles: str | dict[str, str]) -> PreTrainedTokenizerFast:
    """A token a byte, and the special ones behind them."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteDecoder()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def blip(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *"abcdefghijklmnopqrstuvwxyz", "red", "circle", "photo", "of"]
    tokenizer = Tokenizer(WordPiece(vocab={word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]", bos_token="[DEC]").save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**size, "vocab_size": len(words), "encoder_hidden_size": WIDTH, "bos_token_id": 4,
                     "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, "projection_dim": WIDTH,
                     "is_decoder": True},
        vision_config={**size, "image_size": 32, "patch_size": 16, "projection_dim": WIDTH}, projection_dim=WIDTH)
    return _save(folder, BlipForConditionalGeneration, config)


def florence(folder: Path) -> Path:
    special = ["<s>", "<pad>", "</s>", "<image>"]
    tokenizer = _bytes(special, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
                       extra_special_tokens={"image_token": "<image>"})
    tokenizer.save_pretrained(folder)
    begin, pad, end, image = tokenizer.convert_tokens_to_ids(special)
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    images.save_pretrained(folder)
    text = BartConfig(vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                      decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, bos_token_id=begin,
                      pad_token_id=pad, eos_token_id=end, decoder_start_token_id=end, forced_eos_token_id=end)
    vision = {"embed_dim": [8, 16, 16, 32], "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2], "window_size": 4,
              "depths": [1, 1, 1, 1], "projection_dim": WIDTH}
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=image, bos_token_id=begin,
                             pad_token_id=pad, eos_token_id=end)
    return _save(folder, Florence2ForConditionalGeneration, config)


def qwen(folder: Path, version: str = "2.5") -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    tokenizer = _bytes(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    pad, _, end, vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(special)
    patch = 14 if version == "2.5" else 16
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112, patch_size=patch).save_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": pad,
            "eos_token_id": end, "pad_token_id": pad,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2, "patch_size": patch,
              "out_hidden_size": WIDTH}
    tokens = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": vision_start,
              "vision_end_token_id": vision_end}
    if version == "2.5":
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        return _save(folder, Qwen2_5_VLForConditionalGeneration,
                     Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    text["rope_parameters"]["mrope_interleaved"] = True
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return _save(folder, Qwen3VLForConditionalGeneration,
                 Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))


def _save(folder: Path, model: type, config: object) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    return folder


TAGS = [("rating_safe", "9"), ("long_hair", "0"), ("red_circle", "0"), ("^_^", "0"), ("alice_(story)", "4"),
        ("blue_sky", "0")]


def tagger(folder: Path, batch: int | str = "batch", side: int = 8, tags: int = len(TAGS)) -> Path:
    """A tagger whose probabilities follow the picture: tag i's is a mean colour of it, out of 255, times a factor.

    Blue, green, red in turn, as the channels come; factors 1, 1, 1, 0.5, 1, 0.5.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.zeros((3, tags), np.float32)
    for tag in range(tags):
        weights[tag % 3, tag] = (0.5 if tag in (3, 5) else 1.0) / 255
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["input_1:0", "axes"], ["means"], keepdims=0),
         helper.make_node("MatMul", ["means", "weights"], ["predictions"])],
        "tagger", [helper.make_tensor_value_info("input_1:0", TensorProto.FLOAT, [batch, side, side, 3])],
        [helper.make_tensor_value_info("predictions", TensorProto.FLOAT, [batch, tags])],
        [numpy_helper.from_array(np.array([1, 2], np.int64), "axes"), numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    with open(folder / "selected_tags.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows([(number, name, category, 1) for number, (name, category) in enumerate(TAGS)])
    return folder


def old_florence(folder: Path) -> Path:
    """As much of Florence-2's first form as tells it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "florence2", "vision_config": {"model_type": "davit", "dim_embed": [128, 256, 512, 1024]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
