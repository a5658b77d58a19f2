"""What programs make of our files: base weights after loading equal W + ΔW, for every family, method and format."""

import pytest
import torch
from safetensors.torch import load_file

from tests import consumers, lora_models
from trainer.export import formats
from trainer.export.writer import write

ROUNDING = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
METHODS = {
    "lora": dict(method="lora"), "stiefel": dict(method="stiefel"),
    "stella": dict(method="stella", init="random"), "trilora": dict(method="trilora"),
    "pseudo-zero": dict(method="stella", init="pseudo-zero"), "pissa": dict(method="lora", init="pissa"),
    "pruned": dict(method="stella", diagonal_s=True),
}
UNET, FLUX = ("all", "text_encoder"), ("all",)
MODELS = {"sd15": UNET, "sdxl": UNET, "flux1": FLUX, "klein": FLUX, "dev": FLUX}
# Which format each program reads whole, as far as we train; diffusers' Flux.1 numbers of F5 are those of the true size
READ_WHOLE = {
    "sd15": {"U1": "comfyui a1111 forge diffusers", "U2": "comfyui a1111 forge"},
    "sdxl": {"U1": "comfyui forge diffusers", "U2": "comfyui a1111 forge diffusers"},
    "flux1": {"F1": "comfyui forge diffusers", "F5": "comfyui forge", "F6": "comfyui forge"},
    "flux2": {"F1": "comfyui diffusers", "F5": "comfyui diffusers", "F6": "comfyui diffusers"},
}
CASES = [(model, form) for model, family in lora_models.SIZES.items() for form in READ_WHOLE[family]]


def made(model, name, groups=None, **options):
    adapter = lora_models.adapter(model, groups or MODELS[model], **(METHODS[name] | options))
    if name == "pruned":
        adapter.prune(2)
    return adapter


def change(before, after):
    return {name: after[name].double() - tensor.double() for name, tensor in before.items()}


def assert_same(found, wanted, base, tolerance):
    """The changes of every weight agree, in proportion to the largest that is wanted of it."""
    assert found.keys() == wanted.keys()
    for name, expected in change(base, wanted).items():
        error = (found[name].double() - base[name].double() - expected).norm()
        assert error <= tolerance * expected.norm() + 1e-6 * base[name].double().norm(), name


def fused(model, path):
    """The weights of diffusers' own model with a file loaded and fused."""
    pipe = lora_models.pipeline(model)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return lora_models.weights(model, {name: getattr(pipe, name) for name in lora_models.parts(model)})


def check(path, model, form, wanted, dtype="fp32", programs=None):
    family, base = lora_models.SIZES[model], lora_models.weights(model)
    for program in programs or READ_WHOLE[family][form].split():
        if program == "diffusers":
            assert_same(fused(model, path), wanted, base, ROUNDING[dtype])
        else:
            native = consumers.native(family, base)
            assert_same(consumers.merged(program, load_file(path), family, base), consumers.native(family, wanted),
                        native, ROUNDING[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "form"), CASES)
def test_programs_merge_exactly_our_change(tmp_path, model, form, method):
    adapter = made(model, method)
    write(tmp_path / "a.safetensors", adapter.pairs("raw"), family=lora_models.SIZES[model], dtype="fp32", metadata={},
          form=form)
    wanted = lora_models.expected(model, adapter)
    programs = READ_WHOLE[lora_models.SIZES[model]][form].split()
    if method not in ("lora", "pruned"):  # ComfyUI and, where it reads the format, diffusers; all programs read two
        programs = [programs[0], programs[-1]]
    check(tmp_path / "a.safetensors", model, form, wanted, programs=programs)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_half_precision_errs_by_its_rounding(tmp_path, model, dtype):
    adapter, family = made(model, "stella"), lora_models.SIZES[model]
    write(tmp_path / "a.safetensors", adapter.pairs("raw"), family=family, dtype=dtype, metadata={})
    check(tmp_path / "a.safetensors", model, formats.WRITTEN[family][0], lora_models.expected(model, adapter), dtype)


@pytest.mark.parametrize("form", ["F1", "F5", "F6"])
@pytest.mark.parametrize("model", ["flux1", "klein"])
def test_separate_adapters_of_q_k_and_v_are_fused_and_padded(tmp_path, model, form):
    """Ranks 3r and 4r, blocks of the fused rows; attention alone leaves the mlp's rows of Flux.1 to be filled in."""
    family = lora_models.SIZES[model]
    adapter = made(model, "lora", ("attention",), fuse=False)
    write(tmp_path / "a.safetensors", adapter.pairs("raw"), family=family, dtype="fp32", metadata={}, form=form)
    check(tmp_path / "a.safetensors", model, form, lora_models.expected(model, adapter))
    tensors = load_file(tmp_path / "a.safetensors")
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(("lora_down.weight", "lora_A.weight"))}
    parts = {"flux1": {"F1": {3}, "F5": {3, 9, 12}, "F6": {12}}, "klein": {"F1": {3}, "F5": {3, 9}, "F6": {9}}}
    assert ranks == parts[model][form]


@pytest.mark.parametrize("form", ["U1", "U2"])
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("method", ["lora", "stiefel", "stella"])
def test_dora_is_exact_where_it_can_be_read(tmp_path, model, form, method):
    adapter = made(model, method, dora=True)
    path, family = tmp_path / "a.safetensors", lora_models.SIZES[model]
    write(path, adapter.pairs("raw"), family=family, dtype="fp32", metadata={}, form=form)
    programs = [program for program in READ_WHOLE[family][form].split() if program != "diffusers"]
    check(path, model, form, lora_models.expected(model, adapter), programs=programs)
    if method == "lora" and "diffusers" in READ_WHOLE[family][form]:
        with pytest.raises(AssertionError):  # it drops the magnitudes: what verify warns of
            check(path, model, form, lora_models.expected(model, adapter), programs=["diffusers"])


@pytest.mark.parametrize(("model", "form", "module", "programs"), [
    ("flux1", "F6", "norm_out.linear", "comfyui forge"), ("flux1", "F5", "norm_out.linear", "comfyui forge"),
    ("klein", "F6", "norm_out.linear", "comfyui"), ("klein", "F1", "norm_out.linear", "comfyui diffusers"),
    ("klein", "F6", "double_stream_modulation_img.linear", "comfyui diffusers"),
    ("dev", "F6", "time_guidance_embed.guidance_embedder.linear_1", "comfyui diffusers"),
    ("flux1", "F1", "norm_out.linear", "comfyui forge diffusers"), ("flux1", "F6", "x_embedder", "comfyui forge"),
    ("flux1", "F1", "time_text_embed.text_embedder.linear_2", "comfyui forge diffusers")])
def test_layers_outside_the_blocks_are_right_too(tmp_path, model, form, module, programs):
    """Others train these; of the last norm the authors' halves are the other way round."""
    base = lora_models.weights(model)
    name = f"transformer.{module}"
    m, n = base[f"{name}.weight"].shape
    torch.manual_seed(0)
    up, down = torch.randn(m, 2), torch.randn(2, n)
    write(tmp_path / "a.safetensors", [(name, up, down, None)], family=lora_models.SIZES[model], dtype="fp32",
          metadata={}, form=form)
    wanted = {key: tensor.double() for key, tensor in base.items()}
    wanted[f"{name}.weight"] += up.double() @ down.double()
    check(tmp_path / "a.safetensors", model, form, wanted, programs=programs.split())


@pytest.mark.parametrize("shared", [True, False])
def test_diffusers_reads_the_true_flux1_of_f5(tmp_path, shared):
    """Its converter of kohya's names knows the true sizes alone, so its change is taken before any model has it."""
    from diffusers import FluxPipeline

    torch.manual_seed(0)
    block = "transformer.single_transformer_blocks.37"
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    common = torch.randn(2, 3072)
    pairs = [(f"{block}.{part}", torch.randn(count, 2), common if shared else torch.randn(2, 3072), None)
             for part, count in rows.items()]
    write(tmp_path / "a.safetensors", pairs, family="flux1", dtype="fp32", metadata={}, form="F5")
    state = FluxPipeline.lora_state_dict(tmp_path, weight_name="a.safetensors")
    assert len(state) == 8
    for name, up, down, _ in pairs:
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        assert a.shape[0] == 2
        torch.testing.assert_close(b[:50] @ a, up[:50] @ down)
