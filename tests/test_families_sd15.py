"""SD 1.5: one model from a folder and from single files is the same model, and each function does what it says."""

import json
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests import models
from trainer.errors import UserError
from trainer.families import get, sd15

CPU, FP32 = torch.device("cpu"), torch.float32
LOADERS = (sd15.load_text_encoder, sd15.load_vae, sd15.load_denoiser)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.sd15_folder(tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture(scope="module")
def base(folder):
    return sd15.open_base(str(folder))


@pytest.fixture(scope="module")
def loaded(base):
    return [load(base, CPU, FP32) for load in LOADERS]


def open_file(file, folder, **options):
    return sd15.open_base(str(file), tokenizer=str(folder / "tokenizer"), **options)


def assert_same_weights(modules, others, cast=FP32):
    for module, other in zip(modules, others, strict=True):
        expected, found = module.state_dict(), other.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor.to(cast).float(), found[name].float()), name


def test_a_family_is_found_by_name():
    assert get("sd15") is sd15


def test_an_opened_base_says_what_it_is(base, folder, loaded):
    encoder, vae, unet = loaded
    assert base.name == "tiny" and base.path == folder and base.model_hash == ""
    assert base.params["unet"] == sum(weight.numel() for weight in unet.parameters())
    assert base.file_bytes["unet"] == 4 * base.params["unet"]
    assert base.params["text_encoder"] == sum(weight.numel() for weight in encoder.parameters())
    assert (base.prediction_type, base.prediction_told, base.notes) == ("epsilon", True, ())


def test_a_loaded_folder_is_what_diffusers_loads(folder, loaded):
    pairs = [CLIPTextModel.from_pretrained(folder / "text_encoder"), AutoencoderKL.from_pretrained(folder / "vae"),
             UNet2DConditionModel.from_pretrained(folder / "unet")]  # fmt: skip
    assert_same_weights(pairs, [loaded[0].model, *loaded[1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_file_holds_the_same_model_as_its_folder(dtype, folder, loaded, tmp_path):
    file = models.sd15_file(tmp_path / "tiny.safetensors", folder, dtype)
    base = open_file(file, folder)
    assert_same_weights(loaded, [load(base, CPU, FP32) for load in LOADERS], cast=dtype)
    assert len(base.model_hash) == 8


def test_folder_and_single_file_predict_the_same(folder, loaded, tmp_path):
    base = open_file(models.sd15_file(tmp_path / "tiny.safetensors", folder), folder)
    encoder, vae, unet = (load(base, CPU, FP32) for load in LOADERS)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = sd15.encode_images(vae, pixels)
    text = sd15.encode_prompts(encoder, ["a red house"])
    step = torch.tensor([300])
    prediction = sd15.predict(unet, latents, step, text)
    assert torch.equal(latents, sd15.encode_images(loaded[1], pixels))
    expected = sd15.predict(loaded[2], latents, step, sd15.encode_prompts(loaded[0], ["a red house"]))
    assert torch.equal(prediction, expected) and prediction.shape == latents.shape == (1, 4, 8, 8)


def test_parts_load_frozen_in_eval_mode_and_in_the_dtype_asked_for(base):
    for load in LOADERS:
        module = load(base, CPU, torch.bfloat16)
        assert not module.training
        assert all(weight.dtype == torch.bfloat16 and not weight.requires_grad for weight in module.parameters())
        assert not any(tensor.is_meta for tensor in module.buffers())
    assert sd15.load_vae(base, CPU, torch.float16).dtype == FP32


def test_a_file_replaced_after_loading_changes_nothing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    unet = sd15.load_denoiser(sd15.open_base(str(tmp_path / "copy")), CPU, FP32)
    before = unet.conv_in.weight.clone()
    weights = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(0)
        stream.write(bytes(weights.stat().st_size))
    assert torch.equal(unet.conv_in.weight, before)


def test_split_files_of_comfyui_make_a_base(folder, loaded, tmp_path):
    whole = load_file(models.sd15_file(tmp_path / "whole.safetensors", folder))
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "clip": "cond_stage_model.transformer."}
    for part, prefix in prefixes.items():
        tensors = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
        save_file(tensors, tmp_path / f"{part}.safetensors")
    with pytest.raises(UserError, match=r"unet\.safetensors has no VAE, no text encoder: give .* as model\.vae"):
        open_file(tmp_path / "unet.safetensors", folder)
    vae, clip = str(tmp_path / "vae.safetensors"), str(tmp_path / "clip.safetensors")
    base = open_file(tmp_path / "unet.safetensors", folder, vae=vae, text_encoder=clip)
    assert_same_weights(loaded, [load(base, CPU, FP32) for load in LOADERS])


def test_another_vae_and_text_encoder_can_be_folders(folder, base, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    shutil.rmtree(tmp_path / "base" / "text_encoder")
    opened = sd15.open_base(str(tmp_path / "base"), vae=str(folder / "vae"), text_encoder=str(folder))
    assert (opened.vae_id, opened.text_id) == (base.vae_id, base.text_id)


def test_old_attention_names_of_a_vae_folder_are_understood(folder, loaded, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    weights = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(weights).items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = tensor.clone()
    save_file(tensors, weights)
    assert_same_weights([loaded[1]], [sd15.load_vae(sd15.open_base(str(tmp_path / "old")), CPU, FP32)])


def test_ids_follow_the_content_and_nothing_else(folder, base, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    moved = sd15.open_base(str(tmp_path / "other"))
    assert (moved.vae_id, moved.text_id, moved.denoiser_id) == (base.vae_id, base.text_id, base.denoiser_id)
    assert sd15.open_base(str(folder), clip_skip=2).text_id != base.text_id
    weights = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(weights).items()}, weights)
    trained = sd15.open_base(str(tmp_path / "other"))
    assert trained.denoiser_id != base.denoiser_id and trained.vae_id == base.vae_id


@pytest.mark.parametrize(
    ("marks", "metadata", "chosen", "expected", "told", "note"),
    [
        ([], {}, "auto", "epsilon", False, "epsilon is assumed"),
        ([], {}, "v_prediction", "v_prediction", True, ""),
        (["v_pred"], {}, "auto", "v_prediction", True, ""),
        (["v_pred", "ztsnr"], {}, "epsilon", "v_prediction", True, "model.prediction = epsilon is not used"),
        ([], {"modelspec.prediction_type": "v"}, "auto", "v_prediction", True, ""),
        ([], {"modelspec.prediction_type": "epsilon"}, "auto", "epsilon", True, ""),
    ],
)
def test_the_prediction_type_of_a_single_file(folder, tmp_path, marks, metadata, chosen, expected, told, note):
    extra = {name: torch.zeros(0) for name in marks}
    file = models.sd15_file(tmp_path / "marked.safetensors", folder, extra=extra, metadata=metadata)
    base = open_file(file, folder, prediction=chosen)
    assert (base.prediction_type, base.prediction_told) == (expected, told)
    assert note in " ".join(base.notes) and bool(note) == bool(base.notes)
    assert sd15.objective(base).prediction_type == expected
    assert (sd15.objective(base).alphas_cumprod[-1] == 0) == ("ztsnr" in marks)


def test_the_prediction_type_of_a_folder_is_its_schedulers(tmp_path):
    base = sd15.open_base(str(models.sd15_folder(tmp_path / "v", "v_prediction", zero_snr=True)))
    objective = sd15.objective(base)
    assert base.prediction_type == objective.prediction_type == "v_prediction"
    assert objective.alphas_cumprod[-1] == 0


def test_parts_that_do_not_fit_together_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "odd")
    config = tmp_path / "odd" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 128}))
    with pytest.raises(UserError, match=r"is a CLIP \(128 wide\), and the UNet of .* needs a CLIP \(64 wide\)"):
        sd15.open_base(str(tmp_path / "odd"))
    file = models.sd15_file(tmp_path / "tiny.safetensors", folder)
    with pytest.raises(UserError, match="vocabulary of its own .514 tokens.: give its tokenizer"):
        sd15.open_base(str(file))
    with pytest.raises(UserError, match="clip_skip = 4, and the text encoder has 3 layers"):
        sd15.open_base(str(folder), clip_skip=4)


def test_images_encode_to_the_posteriors_mean_and_decode_to_pictures(loaded):
    vae = loaded[1]
    pixels = torch.rand(2, 3, 64, 48) * 2 - 1
    latents = sd15.encode_images(vae, pixels)
    assert latents.shape[1:] == sd15.latent_shape(48, 64)
    expected = vae.encode(pixels).latent_dist.mode() * 0.18215
    torch.testing.assert_close(latents, expected)
    pictures = sd15.decode_latents(vae, latents)
    decoded = vae.decode(expected / 0.18215).sample
    assert pictures.shape == (2, 64, 48, 3) and pictures.dtype == torch.uint8
    torch.testing.assert_close(pictures[1].float(), ((decoded[1] + 1) * 127.5).clamp(0, 255).permute(1, 2, 0), atol=0.6,
                               rtol=0)  # fmt: skip


def test_gradient_checkpointing_changes_memory_and_not_gradients(base):
    unet = sd15.load_denoiser(base, CPU, FP32)
    noisy = torch.randn(1, 4, 8, 8, requires_grad=True)
    text = {"prompt_embeds": torch.randn(1, 77, models.TEXT_WIDTH)}
    gradients = []
    for on in (False, True, False):
        sd15.set_gradient_checkpointing(unet, on)
        assert unet.is_gradient_checkpointing == on
        prediction = sd15.predict(unet, noisy, torch.tensor([10]), text)
        gradients.append(torch.autograd.grad(prediction.square().sum(), noisy)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize(
    ("group", "count", "plots"),
    [
        ("attention", 128, {f"{way}.attn{i}" for way in ("down", "mid", "up") for i in (1, 2)}),
        ("feed_forward", 32, {"down.ff", "mid.ff", "up.ff"}),
        ("projection", 32, {"down.proj", "mid.proj", "up.proj"}),
        ("text_encoder", 18, {"text.attn", "text.ff"}),
    ],
)
def test_adapter_targets_of_a_group(loaded, group, count, plots):
    targets = sd15.adapter_targets({"unet": loaded[2], "text_encoder": loaded[0]}, [group])
    assert len(targets) == len({target.name for target in targets}) == count
    assert {target.group for target in targets} == plots
    layer = torch.nn.Conv2d if group == "projection" else torch.nn.Linear
    assert all(isinstance(target.module, layer) for target in targets)


def test_adapter_targets_have_names_that_outlive_versions(loaded):
    models_ = {"unet": loaded[2], "text_encoder": loaded[0]}
    targets = {target.name: target for target in sd15.adapter_targets(models_, ["attention", "text_encoder"])}
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert targets[f"{block}.attn2.to_k"].module.in_features == models.TEXT_WIDTH
    assert targets[f"{block}.attn2.to_k"].group == "down.attn2"
    assert f"{block}.attn1.to_out.0" in targets and f"{block}.ff.net.2" not in targets
    name = "text_encoder.text_model.encoder.layers.2.self_attn.q_proj"
    assert targets[name].module is loaded[0].body.encoder.layers[2].self_attn.q_proj
    assert sd15.adapter_targets({"unet": loaded[2]}, ["attention"])[0].name.startswith("unet.")


def test_bucket_steps_shrink_with_the_picture():
    assert [sd15.bucket_step(side) for side in (64, 128, 256, 512, 1024)] == [8, 16, 32, 64, 64]


def test_the_shipped_configs_are_of_the_true_sizes():
    def on_meta(build, name):
        with torch.device("meta"):
            return build(json.loads((sd15._CONFIGS / f"{name}.json").read_text()))

    unet = on_meta(UNet2DConditionModel.from_config, "unet")
    vae = on_meta(AutoencoderKL.from_config, "vae")
    text = on_meta(lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)), "text_encoder")
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert len(sd15.adapter_targets({"unet": unet}, ["attention", "feed_forward", "projection"])) == 192
