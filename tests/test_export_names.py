"""The names map against the keys that ComfyUI accepts for the true SD1.5."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.export import names

GOLDEN = Path(__file__).parent / "golden" / "comfyui_keys.json.gz"
FAMILIES = sorted(names.FORMATS)


@pytest.fixture(scope="module")
def accepted():
    """ComfyUI's key → [weight name, shape, slice]."""
    with gzip.open(GOLDEN) as file:
        return json.load(file)["sd15"]


@pytest.fixture(scope="module")
def unet_weights():
    """Path → shape of every Linear and Conv2d of the true SD1.5 UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    return {f"unet.{name}": list(module.weight.shape) for name, module in unet.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}


@pytest.fixture(scope="module")
def clip_paths():
    """Every Linear of the true CLIP, whether or not the installed transformers writes `text_model`."""
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                            num_attention_heads=12))
    return [f"text_encoder.text_model.{name.removeprefix('text_model.')}" for name, module in clip.named_modules()
            if isinstance(module, torch.nn.Linear)]


def test_every_weight_of_the_true_unet_has_a_key_with_its_shape(unet_weights, accepted):
    assert len(unet_weights) == 282
    for path, shape in unet_weights.items():
        weight, expected, part = accepted[names.key_of(path, "sd15")]
        assert weight.startswith("diffusion_model.") and (expected, part) == (shape, None), path


def test_the_192_modules_that_kohya_trains_reach_192_weights(unet_weights, accepted):
    paths = [path for path in unet_weights if ".attentions." in path]
    weights = {accepted[names.key_of(path, "sd15")][0] for path in paths}
    assert len(paths) == len(weights) == 192


def test_every_linear_of_the_true_clip_has_kohyas_key(clip_paths):
    parts = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    expected = {f"lora_te_text_model_encoder_layers_{i}_{part}" for i in range(12) for part in parts}
    assert {names.key_of(path, "sd15") for path in clip_paths} == expected and len(clip_paths) == 72


def test_keys_lead_back_to_their_modules(unet_weights, clip_paths):
    for path in [*unet_weights, *clip_paths]:
        assert names.path_of(names.key_of(path, "sd15"), "sd15") == path


def test_a_flattened_clip_path_gets_the_text_model_that_uis_look_for():
    assert (names.key_of("text_encoder.encoder.layers.3.mlp.fc1", "sd15")
            == "lora_te_text_model_encoder_layers_3_mlp_fc1")


@pytest.mark.parametrize("path", ["unet.down_blocks.0.attentions.0.norm", "transformer.blocks.0.to_q", "", "unet.",
                                  "unet.down_blocks.x.resnets.0.conv1", "vae.encoder.conv_in"])
def test_an_unknown_module_has_no_key(path):
    assert names.key_of(path, "sd15") is None


@pytest.mark.parametrize("key", ["lora_unet_input_blocks_1_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                                 "lora_unet_down_blocks_0_attentions_0_proj_in_x"])
def test_an_unknown_key_has_no_module(key):
    assert names.path_of(key, "sd15") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_maps_rows_are_one_to_one(family):
    rows = names.FORMATS[family].rows
    assert len({path for path, _ in rows}) == len({key for _, key in rows}) == len(rows)
    assert all(path.count("#") == key.count("#") for path, key in rows)


def test_tensor_names_are_told_apart():
    key = "lora_unet_mid_block_attentions_0_proj_in"
    assert names.split(f"{key}.lora_down.weight", "sd15") == (key, "down")
    assert names.split(f"{key}.lora_up.weight", "sd15") == (key, "up")
    assert names.split(f"{key}.alpha", "sd15") == (key, "alpha")
    assert names.split(f"{key}.dora_scale", "sd15") == (key, "dora")
    assert names.split(f"{key}.lora_mid.weight", "sd15") is None
