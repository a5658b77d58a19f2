"""SDXL's names map against the keys that ComfyUI accepts for the true SDXL."""

import gzip
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from trainer.export import names
from trainer.families import sdxl

GOLDEN = Path(__file__).parent / "golden" / "comfyui_keys.json.gz"


def test_every_weight_of_the_true_unet_has_a_key_with_its_shape():
    accepted = json.loads(gzip.decompress(GOLDEN.read_bytes()))["sdxl"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl._template("unet"))
    layers = {f"unet.{name}": list(module.weight.shape) for name, module in unet.named_modules()
              if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert len(layers) == 794
    reached = set()
    for path, shape in layers.items():
        key = names.key_of(path, "sdxl")
        weight, expected, part = accepted[key]
        assert weight.startswith("diffusion_model.") and (expected, part) == (shape, None), path
        assert key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_", "lora_unet_time_",
                               "lora_unet_label_", "lora_unet_out_")) and names.path_of(key, "sdxl") == path
        reached.add(weight)
    assert len(reached) == 794
    assert sum(".attentions." in path for path in layers) == 722


def test_both_text_encoders_have_kohyas_keys():
    layer = "encoder.layers.31.self_attn.q_proj"
    assert names.key_of(f"text_encoder.text_model.{layer}", "sdxl").startswith("lora_te1_text_model_encoder_layers_31")
    assert names.key_of(f"text_encoder_2.{layer}", "sdxl") == "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"
