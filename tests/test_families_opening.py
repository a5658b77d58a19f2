"""Whatever is given as a base that is none gets a sentence that names it and says what it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests import models
from trainer.errors import UserError
from trainer.families import sd15
from trainer.families.recognise import FAMILIES, KINDS, file_kind, folder_kind
from trainer.families.tensors import TensorInfo

UNET = "model.diffusion_model."
SD15 = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}
SDXL = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    UNET + "label_emb.0.0.weight": (1280, 2816),
}
FILES = {
    "sd15": SD15,
    "sd15-edit": SD15 | {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
    "sd2": SD15 | {UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    "sdxl": SDXL,
    "sdxl-refiner": SDXL | {UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 1280)},
    "sd3": {UNET + "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
    "flux1": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "flux2": {"double_blocks.0.img_attn.qkv.weight": (1, 1), "double_stream_modulation_img.lin.weight": (1, 1)},
    "chroma": {"double_blocks.0.img_attn.qkv.weight": (1, 1), "distilled_guidance_layer.in_proj.weight": (1, 1)},
    "lora": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)},
    "quantised": {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": (80,)},
    "embedding": {"emb_params": (2, 768)},
    "controlnet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "vae": {"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)},
    "text_encoder": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "other": {"weight": (2, 2)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.sd15_folder(tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def error_of(base, **options) -> str:
    with pytest.raises(UserError) as error:
        sd15.open_base(str(base), **options)
    return str(error.value)


@pytest.mark.parametrize(("kind", "shapes"), FILES.items())
def test_files_are_recognised_by_names_and_shapes(kind, shapes, tmp_path):
    tensors = {name: TensorInfo(tmp_path, name, "F16", shape, 0, 0) for name, shape in shapes.items()}
    assert file_kind(tensors) == kind and kind in KINDS


@pytest.mark.parametrize("kind", sorted(set(FILES) - {"sd15"}))
def test_a_file_of_another_kind_is_refused_by_its_name(kind, tmp_path):
    file = tmp_path / "wrong.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.uint8) for name, shape in FILES[kind].items()}, file)
    told = error_of(file)
    assert told.startswith(f"{file} is {KINDS[kind]}, and model.family = 'sd15' needs an SD 1.5 model: ")
    assert (f"set model.family = '{kind}'" in told) == (kind in FAMILIES)
    for word, way in (("vae", "model.vae"), ("text_encoder", "model.text_encoder"), ("lora", "adapter.start_from")):
        assert (f"give this one as {way}" in told or f"give it as {way}" in told) == (kind == word)


@pytest.mark.parametrize(
    ("pipeline", "unet", "kind"),
    [
        ("StableDiffusionPipeline", {"cross_attention_dim": 768}, "sd15"),
        ("StableDiffusionPipeline", {"cross_attention_dim": 1024}, "sd2"),
        ("StableDiffusionInpaintPipeline", {"in_channels": 9}, "sd15-edit"),
        ("StableDiffusionPipeline", {"addition_embed_type": "text_time"}, "sdxl"),
        ("LatentConsistencyModelPipeline", {"time_cond_proj_dim": 256}, "lcm"),
        ("StableDiffusionXLPipeline", {}, "sdxl"),
        ("StableDiffusion3Pipeline", None, "sd3"),
        ("FluxPipeline", None, "flux1"),
        ("Flux2KleinPipeline", None, "flux2"),
        ("SomethingPipeline", None, "other"),
    ],
)
def test_folders_are_recognised_by_their_configs(pipeline, unet, kind):
    assert folder_kind({"_class_name": pipeline}, unet) == kind


def test_a_folder_of_another_kind_is_refused(copy):
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    told = error_of(copy)
    assert "copy is an SDXL model, and model.family = 'sd15' needs an SD 1.5 model: set model.family = 'sdxl'" in told


@pytest.mark.parametrize("base", ["nowhere/at/all", "model.safetensors", "some/model.safetensors", "./gone"])
def test_what_is_not_there_is_named(base):
    assert error_of(base).startswith(f"there is no folder or file {base}: model.base must be")


def test_a_pickle_is_refused(tmp_path):
    torch.save({}, tmp_path / "model.ckpt")
    assert "model.ckpt is a pickle, which can run any program when it is opened" in error_of(tmp_path / "model.ckpt")


def test_a_folder_without_a_model_index_is_explained(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a model: it has no model_index.json and no .safetensors file" in error_of(tmp_path / "empty")
    assert "is one component of a model, not a model: give the folder above it" in error_of(copy / "unet")
    models.sd15_file(tmp_path / "checkpoints" / "cat.safetensors", copy)
    assert "It holds cat.safetensors: to train on that" in error_of(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("unet/config.json", "there is no file {copy}/unet/config.json"),
        ("vae/config.json", "there is no file {copy}/vae/config.json"),
        ("scheduler/scheduler_config.json", "there is no file {copy}/scheduler/scheduler_config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "there are no .safetensors weights in {copy}/vae"),
        ("tokenizer/tokenizer.json", "{copy}/tokenizer has no CLIP tokenizer"),
    ],
)
def test_a_missing_file_of_a_folder_is_named(copy, gone, message):
    (copy / gone).unlink()
    with pytest.raises(UserError) as error:
        sd15.load_text_encoder(sd15.open_base(str(copy)), "cpu", torch.float32)
    assert message.format(copy=copy) in str(error.value)


def test_a_folder_with_pickled_weights_is_refused(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    assert "has only pickled weights (.bin)" in error_of(copy)


def test_broken_json_is_named(copy):
    (copy / "unet" / "config.json").write_text("{")
    assert f"{copy}/unet/config.json is not valid JSON" in error_of(copy)


def test_a_truncated_file_is_told_with_its_sizes(folder, tmp_path):
    file = models.sd15_file(tmp_path / "cut.safetensors", folder)
    whole = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(whole // 2)
    assert error_of(file) == f"{file} is cut short: it has {whole // 2:,} of {whole:,} bytes. Download it again"


def test_a_file_with_half_a_unet_is_named(tmp_path):
    save_file(
        {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in SD15.items()}, tmp_path / "half.safetensors"
    )
    assert "half.safetensors has no complete UNet: the file is damaged" in error_of(tmp_path / "half.safetensors")


def test_weights_that_are_missing_in_a_part_name_the_part(copy):
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 3}))
    with pytest.raises(UserError, match=r"copy/unet lacks \d+ of \d+ weights, such as down_blocks"):
        sd15.load_denoiser(sd15.open_base(str(copy)), "cpu", torch.float32)


def test_a_wrong_vae_or_text_encoder_is_named(folder, tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    odd = str(tmp_path / "odd.safetensors")
    unknown = "it is no model that is known here. Choose another"
    assert f"odd.safetensors has no VAE: {unknown} model.vae" in error_of(folder, vae=odd)
    assert f"odd.safetensors has no CLIP text encoder: {unknown} model.text" in error_of(folder, text_encoder=odd)
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, odd)
    assert "odd.safetensors has no VAE of this kind: choose another model.vae" in error_of(folder, vae=odd)
    assert "there is no folder gone: model.tokenizer must be" in error_of(folder, tokenizer="gone")
    assert "there is no file gone.safetensors" in error_of(folder, vae="gone.safetensors")


def test_shards_and_fp16_variants_are_found(copy):
    expected = sd15.open_base(str(copy))
    plain = copy / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert sd15.open_base(str(copy)).denoiser_id == expected.denoiser_id
    unet = sd15.load_denoiser(sd15.open_base(str(copy)), "cpu", torch.float32)
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    unet.save_pretrained(copy / "unet", max_shard_size="4MB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    sharded = sd15.open_base(str(copy))
    assert sharded.params == expected.params
    loaded = sd15.load_denoiser(sharded, "cpu", torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.state_dict().items())
