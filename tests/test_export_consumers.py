"""Files written the wrong way are told with program and effect, and what is told is what programs then do."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests import consumers, lora_models
from tests.test_export_merged import fused
from trainer.export.consumers import CONSUMERS, READERS, read_as
from trainer.export.lora_file import open_lora
from trainer.export.writer import write

RANK = 4
CLIP = "text_encoder.text_model.encoder.layers"
Q, OUT = f"{CLIP}.0.self_attn.q_proj", f"{CLIP}.1.self_attn.out_proj"
LAYERS = {  # a few of each kind, by model
    "sd15": ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
             "unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k", "unet.conv_in",
             "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", "unet.up_blocks.0.resnets.1.conv1", Q, OUT,
             f"{CLIP}.1.mlp.fc1"],
    "sdxl": ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "unet.up_blocks.0.upsamplers.0.conv",
             "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0", "unet.add_embedding.linear_1", Q, OUT,
             Q.replace("encoder.", "encoder_2.", 1)],
    "flux1": ["transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k",
              "transformer.transformer_blocks.0.attn.to_v", "transformer.transformer_blocks.1.ff.net.2",
              "transformer.transformer_blocks.1.attn.to_out.0", "transformer.x_embedder",
              "transformer.single_transformer_blocks.1.proj_out"],
    "klein": ["transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k",
              "transformer.transformer_blocks.0.attn.to_v", "transformer.transformer_blocks.1.ff.linear_in",
              "transformer.single_transformer_blocks.1.attn.to_out", "transformer.norm_out.linear",
              "transformer.double_stream_modulation_txt.linear",
              "transformer.time_guidance_embed.timestep_embedder.linear_1"],
}
LAYERS["attention"] = LAYERS["flux1"][:3]


def pairs(model, without=""):
    base = lora_models.weights("flux1" if model == "attention" else model)
    generator, found = torch.Generator().manual_seed(0), []
    for name in LAYERS[model]:
        if without and without in name:
            continue
        m, n, *kernel = base[f"{name}.weight"].shape
        up = torch.randn(m, RANK, *[1] * len(kernel), generator=generator)
        found.append((name, up, 0.1 * torch.randn(RANK, n, *kernel, generator=generator), None))
    return found


# Ways to be wrong: each takes and gives a file's tensors and metadata.


def alphas(value, every=1):
    """Alpha beside every (or every second …) pair, with `up` scaled so that the change stays."""
    def change(tensors, texts):
        downs = [name for name in tensors if ".lora_down." in name or ".lora_A." in name]
        for name in downs[::every]:
            key = name.rsplit(".lora_", 1)[0]
            tensors[f"{key}.alpha"] = torch.tensor(float(value))
        return tensors, texts
    return change


def renamed(*replacements):
    def change(tensors, texts):
        for old, new in replacements:
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors, texts
    return change


def dropped(*words):
    def change(tensors, texts):
        return {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}, texts
    return change


def said(**texts_added):
    return lambda tensors, texts: (tensors, texts | texts_added)


def added(**shapes):
    return lambda tensors, texts: (tensors | {f"{name}.lora_up.weight": torch.ones(shape)
                                              for name, shape in shapes.items()}, texts)


def one_rank_less(tensors, texts):
    """The last layer's rank is one lower, and its change what is left."""
    key = [name for name in tensors if ".lora_down." in name or ".lora_A." in name][-1].rsplit(".lora_", 1)[0]
    for name in [name for name in tensors if name.startswith(f"{key}.lora_")]:
        tensors[name] = (tensors[name][:-1] if "down" in name or "lora_A" in name else tensors[name][:, :-1]) + 0.0
    if f"{key}.alpha" in tensors:
        tensors[f"{key}.alpha"] = torch.tensor(RANK - 1.0)
    return tensors, texts


def dora(axis, part=""):
    def change(tensors, texts):
        for name in [name for name in tensors if ".lora_down." in name and part in name]:
            key, n = name.removesuffix(".lora_down.weight"), tensors[name].shape[1]
            m, tail = len(tensors[f"{key}.lora_up.weight"]), (1,) * (tensors[name].ndim - 2)
            tensors[f"{key}.dora_scale"] = 1 + torch.rand((m, 1, *tail) if axis == "output" else (1, n, *tail))
        return tensors, texts
    return change


def chain(*changes):
    def change(tensors, texts):
        for one in changes:
            tensors, texts = one(tensors, texts)
        return tensors, texts
    return change


def whole(tensors, texts):
    return tensors, texts


PEFT = [("lora_down", "lora_A"), ("lora_up", "lora_B")]
KOHYA = [(new, old) for old, new in PEFT]
CONFIG = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["x_embedder", "proj_out", "to_q", "to_k", "to_v",
                                                                "to_out.0", "net.2"]).to_dict()
ADAPTER = json.dumps({f"transformer.{key}": list(value) if isinstance(value, set) else value
                      for key, value in CONFIG.items()})  # as diffusers keeps it
ONETRAINER = ("transformer.transformer_blocks.0.attn.", "lora_transformer_transformer_blocks_0_attn_")
UIS = ("comfyui", "a1111", "forge")
# name: model, layers left out, format written, what is done to it, {program: what is told}; the others read all
FILES = {
    "sd15 as it should be": ("sd15", "", "U1", whole, {}),
    "sdxl as it should be": ("sdxl", "add_embedding", "U2", whole, {}),
    "flux1 as it should be": ("flux1", "", "F1", whole, {}),
    "1 alpha in F1 of Flux.2": ("klein", "stream|norm_out|time", "F1", alphas(RANK), {
        "diffusers": "raises an error over the alpha keys"}),
    "1 alpha in F6 of Flux.2": ("klein", "norm_out", "F6", alphas(RANK), {"diffusers": "error over the alpha keys"}),
    "1 alpha in F1 of Flux.1": ("flux1", "", "F1", alphas(2), {}),
    "2 alphas differ in SD 1.5": ("sd15", "text_", "U1", alphas(1, every=2), {
        "diffusers": "applies attention layers at"}),
    "2 alphas differ in a text encoder": ("sd15", "", "U1", alphas(1, every=3), {
        "diffusers": "applies attention layers at 4 times the strength meant"}),
    "2 alphas differ in SDXL": ("sdxl", "add_embedding", "U2", alphas(1, every=3), {
        "diffusers": "applies attention layers at 4 times the strength"}),
    "3 ranks differ in SD 1.5": ("sd15", "text_", "U1", one_rank_less, {"diffusers": "before version 0.40"}),
    "3 ranks differ in Flux.2": ("klein", "stream|norm_out|time", "F1", one_rank_less, {
        "diffusers": "before version 0.40 takes one layer's rank for all"}),
    "4 no out_proj": ("sd15", "", "U1", dropped("out_proj"), {"diffusers": "drops q, k and v of a text encoder"}),
    "4 neither out_proj nor mlp": ("sd15", "", "U1", dropped("out_proj", "mlp"), {
        "diffusers": "raises an error over a text encoder"}),
    "4 half an attention": ("sdxl", "add_embedding", "U2", dropped("te2_text_model_encoder_layers_0_self_attn_k"), {
        "a1111": "drops attention of the second text encoder"}),
    "5 no text_model": ("sd15", "", "U1", renamed(("te_text_model_", "te_")), dict.fromkeys(
        UIS, "drops the text encoder: its names lack text_model")),
    "5 lora_te for SDXL": ("sdxl", "add_embedding", "U2", renamed(("lora_te1_", "lora_te_")), {
        "a1111": "drops the first text encoder"}),
    "6 metadata in kohya's": ("sd15", "", "U1", said(lora_adapter_metadata=ADAPTER), {
        "diffusers": "raises an error: alphas and lora_adapter_metadata"}),
    "6 metadata with another alpha": ("flux1", "", "F1", said(lora_adapter_metadata=ADAPTER), {
        program: "says alpha 8 for rank 4: 0.5 times the strength meant" for program in ("comfyui", "forge")}),
    "DoRA": ("sd15", "", "U1", dora("input"), {"diffusers": "cannot read DoRA magnitudes"}),
    "DoRA of the output axis": ("sd15", "", "U1", dora("output"), {
        "comfyui": "up to a quarter of the change", "forge": "instead of the changed ones",
        "a1111": "the pictures are garbage", "diffusers": "plain LoRA"}),
    "DoRA of some layers": ("sd15", "text_", "U1", dora("input", part="_ff_"), {
        "diffusers": "applies a plain LoRA"}),
    "alpha missing once": ("sd15", "", "U1", chain(alphas(2), dropped("conv_in.alpha")), dict.fromkeys(
        UIS, "layers without alpha at 2 times the strength of the others")),
    "alpha missing throughout": ("sd15", "", "U1", chain(dropped(".alpha"), said(
        ss_network_alpha="2.0", ss_network_dim=str(RANK))), {
        program: "applies 2 times the strength meant: the file says alpha" for program in CONSUMERS}),
    "a tensor nobody knows": ("sd15", "", "U1", added(lora_unet_alien=(4, 4)), {
        **dict.fromkeys(UIS, "drops them"), "diffusers": "raises an error over tensors"}),
    "half a layer": ("sd15", "", "U1", dropped("conv_in.lora_up"), {
        **dict.fromkeys(UIS, "drops layers of which one half is missing"), "diffusers": "lack their other half"}),
    "PEFT for a UNet": ("sd15", "text_", "U1", chain(dropped(".alpha"), renamed(
        *PEFT, ("lora_unet_conv_in", "unet.conv_in"), *[(name.replace(".", "_").replace("unet", "lora_unet", 1), name)
                                                        for name in LAYERS["sd15"]])), {
        "comfyui": "drops every attention layer", "forge": "refuses", "a1111": "applies nothing"}),
    **{f"PEFT's endings for {form} of {model}": (model, without, form, renamed(*PEFT), dict.fromkeys(
        programs, "raises an error over endings")) for model, without, form, programs in (
            ("sd15", "", "U1", ("a1111", "diffusers")), ("sdxl", "add_embedding", "U2", ("a1111", "diffusers")),
            ("flux1", "x_embedder|proj_out", "F5", ("diffusers",)),
            ("klein", "stream|norm_out|time", "F5", ("diffusers",)))},
    "PEFT's endings once": ("sd15", "", "U1", renamed(*[(f"conv_in.{old}", f"conv_in.{new}") for old, new in PEFT]),
                            dict.fromkeys(("a1111", "diffusers"), "raises an error over endings")),
    "kohya's endings once": ("flux1", "", "F1", renamed(*[(f"x_embedder.{old}", f"x_embedder.{new}")
                                                         for old, new in KOHYA]), {}),
    "kohya's endings once, with alpha": ("flux1", "", "F1", chain(alphas(2), renamed(
        *[(f"x_embedder.{old}", f"x_embedder.{new}") for old, new in KOHYA])), {
            "diffusers": "in these names: 2 times the"}),
    "kohya's endings once in Flux.2": ("klein", "stream|norm_out|time", "F1", renamed(
        *[(f"to_q.{old}", f"to_q.{new}") for old, new in KOHYA]), {"diffusers": "raises an error"}),
    "U2 for SD 1.5": ("sd15", "", "U2", whole, {"diffusers": "raises an error"}),
    "U1 for SDXL": ("sdxl", "", "U1", whole, {"diffusers": "drops the size embedding", "a1111": "the first upsampler"}),
    "F3": ("flux1", "", "F1", chain(renamed(*KOHYA), alphas(2)), {"diffusers": "in these names: 2 times the"}),
    "F4": ("attention", "", "F1", chain(renamed(*KOHYA, ONETRAINER), alphas(2)), {}),
    "F4 without alpha": ("attention", "", "F1", renamed(*KOHYA, ONETRAINER), {
        "diffusers": "raises an error in these names"}),
    "F5": ("flux1", "single", "F5", whole, {"diffusers": "drops the layers outside the blocks"}),
    "F5 of Flux.2": ("klein", "", "F5", whole, {"diffusers": "drops the modulation"}),
    "F6": ("flux1", "", "F6", whole, {"diffusers": "applies nothing"}),
    "F6 of Flux.2": ("klein", "", "F6", whole, {"diffusers": "scale and shift the wrong way round"}),
    "F1 of Flux.2": ("klein", "", "F1", whole, {"comfyui": "drops the modulation and the time embedding"}),
    "F9": ("flux1", "", "F1", renamed(("transformer.", "")), {
        "diffusers": "applies nothing", "forge": "applies nothing"}),
}


@pytest.fixture(params=FILES)
def case(request, tmp_path):
    """(model, path of the wrong file, what is told of it)"""
    model, without, form, change, told = FILES[request.param]
    own = [pair for pair in pairs(model) if not without or not any(word in pair[0] for word in without.split("|"))]
    model = "flux1" if model == "attention" else model
    path = tmp_path / "wrong.safetensors"
    write(path, own, family=lora_models.SIZES[model], dtype="fp32", metadata={}, form=form)
    tensors, texts = change(load_file(path), {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, texts)
    return model, path, told


def test_what_is_wrong_is_told_with_program_and_effect(case):
    model, path, told = case
    lora = open_lora(path, family=lora_models.SIZES[model])
    found = {program: " | ".join(fault.text for fault in read_as(program, lora, blocks(lora)).faults)
             for program in READERS[lora.family]}
    assert {program for program, text in found.items() if text} == set(told), found
    for program, words in told.items():
        assert words in found[program]


def blocks(lora):
    return {key for key, entry in lora.entries.items() if entry.rank % len(entry.rows) == 0 and len(entry.rows) > 1}


def test_what_is_told_is_what_the_program_does(case):
    """The change that each program makes of a file is the meant one times the strength that is told."""
    model, path, told = case
    family, base = lora_models.SIZES[model], lora_models.weights(model)
    lora = open_lora(path, family=family)
    native = consumers.native(family, base)
    for program in READERS[family]:
        strengths, changed = read_as(program, lora, blocks(lora)).strengths, actual(program, path, model)
        if changed is None:
            assert told.get(program) and not any(strengths.values()), program
            continue
        before = base if program == "diffusers" else native
        wanted, unsaid = predicted(lora, strengths, base, told)
        if program != "diffusers":
            wanted = consumers.native(family, wanted)
        for name, tensor in changed.items():
            error = (tensor.double() - wanted[name]).norm()
            right = error <= 1e-5 * (wanted[name] - before[name]).norm() + 1e-6 * before[name].norm()
            assert right or any(word in name for word in unsaid), (program, name)
        if unsaid and "DoRA" not in str(told):
            assert any(not torch.allclose(changed[name].double(), wanted[name], rtol=1e-3) for name in changed)


def meant_scale(lora, told, key):
    """What metadata, or the other layers' alphas, say of the scale where a layer itself does not."""
    if "the file says" in str(told) or lora.alphas and key not in lora.alphas:
        return 0.5
    return 2.0 if "says alpha 8 for rank 4" in str(told) else 1.0


def actual(program, path, model):
    try:
        if program == "diffusers":
            return fused(model, path)
        return consumers.merged(program, load_file(path), lora_models.SIZES[model], lora_models.weights(model))
    except (consumers.Refused, ValueError, KeyError, RuntimeError, AttributeError, TypeError):
        return None


def predicted(lora, strengths, base, told):
    """Base weights (by diffusers' names) with each layer's meant change times its strength; beside them the names of
    weights for which only "something else" is told."""
    wanted, unsaid = {name: tensor.double() for name, tensor in base.items()}, []
    for key, entry in lora.entries.items():
        if math.isnan(strengths[key]) or "dora" in entry.parts:
            unsaid += [".".join(module.split(".")[1:]) for module in entry.place.modules]
            unsaid += [consumers.native(lora.family, {f"{module}.weight": base[f"{module}.weight"] for module in
                                                      entry.place.modules}).popitem()[0]]
    for name, up, down, _ in lora.pairs():
        key = next(key for key, entry in lora.entries.items() if name in entry.place.modules)
        strength, weight = meant_scale(lora, told, key) * strengths[key], f"{name}.weight"
        delta = (up.double().flatten(1) @ down.double().flatten(1)).view(wanted[weight].shape)
        wanted[weight] = wanted[weight] + (0.0 if math.isnan(strength) else strength) * delta
    return wanted, unsaid


def test_forge_refuses_a_file_with_more_than_twelve_strange_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, pairs("sd15"), family="sd15", dtype="fp32", metadata={})
    for count, whole_file in ((12, False), (13, True)):
        other = tmp_path / f"{count}.safetensors"
        save_file(load_file(path) | {f"alien{i}": torch.ones(2) for i in range(count)}, other)
        reading = read_as("forge", open_lora(other))
        assert any(reading.strengths.values()) != whole_file
        assert ("refuses the whole file: 13 of its tensors" in reading.faults[-1].text) == whole_file


def test_a_program_without_the_family_reads_nothing(tmp_path):
    write(tmp_path / "a.safetensors", pairs("klein"), family="flux2", dtype="fp32", metadata={})
    reading = read_as("a1111", open_lora(tmp_path / "a.safetensors"))
    assert not reading.whole and not any(reading.strengths.values())


@pytest.mark.parametrize("text", ["[" * 5000, '{"transformer.r":' + "9" * 400 + "}", "5", '{"transformer.r":[]}'])
def test_metadata_of_diffusers_that_cannot_be_read_are_told(tmp_path, text):
    write(tmp_path / "a.safetensors", pairs("klein"), family="flux2", dtype="fp32",
          metadata={"lora_adapter_metadata": text})
    reading = read_as("diffusers", open_lora(tmp_path / "a.safetensors"))
    assert [fault.text for fault in reading.faults] == ["cannot read lora_adapter_metadata"]
