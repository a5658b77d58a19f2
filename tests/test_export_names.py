"""The names maps against the keys that ComfyUI accepts, for every family at its true size and every format."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from trainer import families
from trainer.export import names
from trainer.export.formats import FAMILIES, KNOWN, WRITTEN, find

GOLDEN = Path(__file__).parent / "golden" / "comfyui_keys.json.gz"
CONFIGS = Path(families.__file__).parent / "configs"
MODELS = {  # size in the golden list: family, class, and what differs from the family's config
    "sd15": ("sd15", UNet2DConditionModel, {}),
    "sdxl": ("sdxl", UNet2DConditionModel, {}),
    "flux1": ("flux1", FluxTransformer2DModel, {}),
    "flux2_dev": ("flux2", Flux2Transformer2DModel, {}),
    "klein4b": ("flux2", Flux2Transformer2DModel, dict(
        num_attention_heads=24, num_layers=5, num_single_layers=20, joint_attention_dim=7680, guidance_embeds=False)),
    "klein9b": ("flux2", Flux2Transformer2DModel, dict(
        num_attention_heads=32, num_layers=8, num_single_layers=24, joint_attention_dim=12288, guidance_embeds=False)),
}
# size, format: layers of the model, keys of the file, keys that ComfyUI maps to a weight
COUNTS = {
    ("sd15", "U1"): (282, 282, 282), ("sd15", "U2"): (282, 282, 282),
    ("sdxl", "U1"): (794, 794, 794), ("sdxl", "U2"): (794, 794, 794),
    ("flux1", "F1"): (504, 504, 504), ("flux1", "F5"): (504, 314, 314), ("flux1", "F6"): (504, 314, 314),
    ("flux2_dev", "F1"): (203, 203, 196), ("flux2_dev", "F5"): (203, 171, 171), ("flux2_dev", "F6"): (203, 171, 171),
    ("klein4b", "F1"): (109, 109, 104), ("klein4b", "F5"): (109, 89, 89), ("klein4b", "F6"): (109, 89, 89),
    ("klein9b", "F1"): (153, 153, 148), ("klein9b", "F5"): (153, 121, 121), ("klein9b", "F6"): (153, 121, 121),
}
ANY_STYLE = [(family, form.style) for family in FAMILIES for form in KNOWN[family]]


@cache
def accepted(size):
    """ComfyUI's key → [weight name, shape, slice or null, perhaps "swap_halves"]."""
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))[size]


@cache
def layers(size):
    """Path → shape of every Linear and Conv2d of the true denoiser."""
    family, kind, changes = MODELS[size]
    part = "unet" if kind is UNet2DConditionModel else "transformer"
    with torch.device("meta"):
        model = kind.from_config(json.loads((CONFIGS / family / f"{part}.json").read_text()) | changes)
    return {f"{part}.{name}": list(module.weight.shape) for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}


@pytest.mark.parametrize(("size", "form"), COUNTS, ids=lambda value: value)
def test_every_layer_of_the_true_model_reaches_its_weight(size, form):
    family, shapes = MODELS[size][0], layers(size)
    naming = names.naming(family, find(family, form).style)
    places = {path: naming.of(path) for path in shapes}
    keys = {place.key for place in places.values()}
    reached = {key: accepted(size)[key] for key in keys if key in accepted(size)}
    assert (len(shapes), len(keys), len(reached)) == COUNTS[size, form]
    for key, (weight, shape, part, *swap) in reached.items():
        place = naming.at(key)
        rows = sum(shapes[path][0] for path in place.modules)
        assert weight.startswith("diffusion_model.") and weight.endswith(".weight")
        assert [rows, *shapes[place.modules[0]][1:]] == [part[2] if part else shape[0], *shape[1:]], key
        # diffusers' halves are swapped by ComfyUI where the names are diffusers', and by us where they are not
        assert place.swapped == (key.endswith(("adaLN_modulation.1", "adaLN_modulation_1")) and not swap)
    assert all("_blocks." not in key for key in keys - reached.keys())  # what a LoRA trains is all accepted


@pytest.mark.parametrize("size", ["flux1"])
def test_apart_and_fused_names_reach_the_same_rows(size):
    """q, k, v and mlp of F1 are, in this order, the rows of the one weight that F5 and F6 change."""
    apart, shapes = names.naming("flux1", "peft"), layers(size)
    for style in ("kohya", "native"):
        fused = names.naming("flux1", style)
        for path in shapes:
            place = fused.of(path)
            weight, _, part, *_ = accepted(size)[apart.of(path).key]
            assert accepted(size)[place.key][0] == weight, path
            before = place.modules[: place.modules.index(path)]
            assert (part or [0, 0, 0])[1] == sum(shapes[other][0] for other in before), path


@pytest.mark.parametrize("size", MODELS)
def test_every_format_reaches_the_same_weight(size):
    """A layer's keys of all formats change one weight, and no two layers the same rows of it."""
    family = MODELS[size][0]
    forms = [names.naming(family, find(family, form).style) for form in WRITTEN[family]]
    owners: dict[str, set[str]] = {}
    for path in layers(size):
        places = [naming.of(path) for naming in forms]
        weights = {accepted(size)[place.key][0] for place in places if place.key in accepted(size)}
        assert len(weights) == 1, path
        fused = max((place.modules for place in places), key=len)
        owners.setdefault(weights.pop(), set()).update(fused if len(fused) > 1 else [path])
    parts = {1} if family in ("sd15", "sdxl") else {1, 3, 4} if family == "flux1" else {1, 3}
    assert {len(paths) for paths in owners.values()} == parts


def test_the_modules_that_kohya_trains_reach_as_many_weights():
    for size, count in (("sd15", 192), ("sdxl", 722)):
        paths = [path for path in layers(size) if ".attentions." in path]
        for form in WRITTEN[size]:
            naming = names.naming(size, find(size, form).style)
            assert len(paths) == len({accepted(size)[naming.of(path).key][0] for path in paths}) == count


def test_every_linear_of_the_true_clip_has_kohyas_key():
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**json.loads((CONFIGS / "sd15" / "text_encoder.json").read_text())))
    paths = [f"text_encoder.text_model.{name.removeprefix('text_model.')}" for name, module in clip.named_modules()
             if isinstance(module, torch.nn.Linear)]
    parts = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    expected = {f"lora_te_text_model_encoder_layers_{i}_{part}" for i in range(12) for part in parts}
    assert {names.naming("sd15", "kohya").of(path).key for path in paths} == expected and len(paths) == 72


TEXT = "text_model.encoder.layers.3.self_attn.q_proj"
T5 = "text_encoder_2.encoder.block.7.layer.0.SelfAttention.q"


@pytest.mark.parametrize(("family", "style", "module", "key"), [
    ("sd15", "kohya", f"text_encoder.{TEXT}", "lora_te_text_model_encoder_layers_3_self_attn_q_proj"),
    ("sd15", "sgm", "text_encoder.encoder.layers.3.mlp.fc1", "lora_te_text_model_encoder_layers_3_mlp_fc1"),
    ("sdxl", "sgm", f"text_encoder.{TEXT}", "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"),
    ("sdxl", "kohya", "text_encoder_2.encoder.layers.31.mlp.fc2", "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
    ("sdxl", "peft", f"text_encoder_2.{TEXT}", f"text_encoder_2.{TEXT}"),
    ("flux1", "kohya", f"text_encoder.{TEXT}", "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"),
    ("flux1", "kohya", T5, "lora_te2_encoder_block_7_layer_0_SelfAttention_q"),
    ("flux1", "native", T5, "text_encoders.t5xxl.transformer.encoder.block.7.layer.0.SelfAttention.q"),
])
def test_text_encoders_have_the_names_that_consumers_look_for(family, style, module, key):
    assert names.naming(family, style).of(module).key == key
    assert names.naming(family, style).at(key).modules == (names.canonical(module),)


@pytest.mark.parametrize(("key", "module"), [
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ("lora_te_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1")])
def test_other_names_for_a_text_encoder_are_read_but_not_written(key, module):
    naming = names.naming("sd15", "kohya")
    assert naming.at(key).modules == (module,) and naming.of(module).key != key


@pytest.mark.parametrize(("family", "style"), ANY_STYLE)
def test_keys_lead_back_to_their_modules(family, style):
    naming = names.naming(family, style)
    for row in naming.rows:
        key = row.key.replace("#", "7")
        place = naming.at(key)
        assert place.key == key and place.modules == tuple(module.replace("#", "7") for module in row.modules)
        written = naming.of(place.modules[0])
        assert place.modules == written.modules and naming.at(written.key) == written
    assert len({row.key for row in naming.rows}) == len(naming.rows)


@pytest.mark.parametrize("path", ["unet.down_blocks.0.attentions.0.norm", "transformer.blocks.0.to_q", "", "unet.",
                                  "unet.down_blocks.x.resnets.0.conv1", "vae.encoder.conv_in", "unet.conv_in.1"])
def test_an_unknown_module_has_no_key(path):
    assert names.naming("sd15", "kohya").of(path) is None


@pytest.mark.parametrize("key", ["lora_unet_input_blocks_1_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                                 "lora_unet_down_blocks_0_attentions_0_proj_in_x", "unet.conv_in"])
def test_an_unknown_key_has_no_module(key):
    assert names.naming("sd15", "kohya").at(key) is None
