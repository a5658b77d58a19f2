"""Vision-language models that describe an image, through transformers' own classes: Florence-2, BLIP, Qwen-VL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BatchFeature,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Florence2Processor,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import logging

from trainer.errors import UserError

DESCRIBE = ("Describe this image to train an image generator with: subject, pose, clothing, background, light, style. "
            "One or two plain sentences. Do not begin with 'The image shows'.")
IMAGE_TOKEN = "<|image_pad|>"  # Qwen's; stands as often as the picture has patches
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # what Qwen2's chats open with; Qwen3's do not
CHAT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Kind:
    """What differs between models: what resizes images (Pillow's ones: the others need torchvision), how images and
    instruction become inputs, how many beams, what is asked usually."""

    images: type
    prepare: Callable[[Describer, Sequence[Image.Image]], BatchFeature]
    beams: int
    instruction: str
    echoes: bool  # whether what it generates begins with its input


class Describer:
    """A loaded model."""

    tags = False

    def __init__(self, folder: Path, *, instruction: str, max_tokens: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        """Raises `UserError` for a folder whose model is of another kind, or not whole."""
        self.folder, self.max_tokens, self.device, self.dtype = folder, max_tokens, device, dtype
        config = read_config(folder)
        self.model_type = config["model_type"]
        self.kind = KINDS[self.model_type]
        self.instruction = instruction.strip() or self.kind.instruction
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.images = self.kind.images.from_pretrained(folder, local_files_only=True)
            if self.model_type == "florence2":
                self.processor = Florence2Processor(self.images, self.tokenizer)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True,
                                                                local_files_only=True)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise UserError(f"{folder}: the model cannot be loaded: {str(error).strip().splitlines()[0]}. Download "
                            "it again, whole") from error
        self.model = model.to(device).eval()

    @torch.no_grad()
    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """What the model says of each RGB image; the most likely words, so the same each time."""
        inputs = self.kind.prepare(self, images).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, num_beams=self.kind.beams,
                                     do_sample=False)  # b n
        if self.kind.echoes:
            tokens = tokens[:, inputs["input_ids"].shape[1]:]
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.  Raises `UserError` when there is none, or of a kind that cannot be used."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config["model_type"]
    except FileNotFoundError:
        raise UserError(f"{folder}: no captioner: it has neither a config.json (Florence-2, BLIP, Qwen-VL) nor a "
                        "model.onnx with selected_tags.csv (a tagger)") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'config.json'}: not a model's description that can be read; download the model "
                        "again") from None
    if kind not in KINDS:
        raise UserError(f"{folder}: a model of the kind {kind!r} cannot write captions here; take one of "
                        f"{', '.join(sorted(KINDS))}, or a tagger")
    if kind == "florence2" and "dim_embed" in config.get("vision_config", {}):
        raise UserError(f"{folder}: this is Florence-2 as it was first published, which brings program code of its "
                        "own; take the same model from florence-community, such as florence-community/Florence-2-base")
    return config


def _blip(model: Describer, images: Sequence[Image.Image]) -> BatchFeature:
    inputs = model.images(list(images), return_tensors="pt")
    if model.instruction:
        words = model.tokenizer([model.instruction] * len(images), return_tensors="pt")
        inputs |= {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"]}
    return inputs


def _florence(model: Describer, images: Sequence[Image.Image]) -> BatchFeature:
    try:
        return model.processor(images=list(images), text=[model.instruction] * len(images), return_tensors="pt")
    except ValueError as error:
        raise UserError(f"captioning.instruction: Florence-2 does not take {model.instruction!r}: {error}") from None


def _qwen(model: Describer, images: Sequence[Image.Image]) -> BatchFeature:
    """As Qwen's own processor does it, which would need torchvision for its videos."""
    inputs = model.images(list(images), return_tensors="pt")
    merged = model.images.merge_size**2  # patches that become one token
    system = "" if model.model_type.startswith("qwen3") else SYSTEM
    texts = [system + CHAT.format(image=IMAGE_TOKEN * (int(grid.prod()) // merged), text=model.instruction)
             for grid in inputs["image_grid_thw"]]  # grid: frames, rows, columns
    words = model.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids: Tensor = words["input_ids"]
    is_image = ids == model.model.config.image_token_id
    return BatchFeature({**inputs, "input_ids": ids, "attention_mask": words["attention_mask"],
                         "mm_token_type_ids": is_image.int()})


FLORENCE = Kind(CLIPImageProcessorPil, _florence, beams=3, instruction="<DETAILED_CAPTION>", echoes=False)
BLIP = Kind(BlipImageProcessorPil, _blip, beams=3, instruction="", echoes=False)
QWEN = Kind(Qwen2VLImageProcessorPil, _qwen, beams=1, instruction=DESCRIBE, echoes=True)
KINDS = {"florence2": FLORENCE, "blip": BLIP, "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN}
