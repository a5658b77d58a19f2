"""Adapters over stacked rows come apart into modules of the same rank, whose changes are rows of the stacked one."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from safetensors.torch import load_file

from trainer.export import names, verify, writer
from trainer.export.stacked import apart, together
from trainer.families import flux1, flux2

GOLDEN = Path(__file__).parent / "golden" / "comfyui_keys.json.gz"
BLOCK = "transformer.single_transformer_blocks.3"


def pair(name, rows, columns=8, rank=2):
    return name, torch.randn(rows, rank), torch.randn(rank, columns), None


@pytest.mark.parametrize(("ending", "rows", "parts"), [
    ("attn.to_qkv", 24, ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("attn.add_qkv_proj", 24, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    ("attn.to_qkv_mlp", 56, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ("attn.to_qkv_mlp_proj", 56, ["attn.to_qkv_mlp_proj"]),
])
def test_parts_are_the_rows_of_the_whole(ending, rows, parts):
    whole = pair(f"{BLOCK}.{ending}", rows)
    found = list(apart([whole]))
    assert [name for name, *_ in found] == [f"{BLOCK}.{part}" for part in parts]
    torch.testing.assert_close(torch.cat([up @ down for _, up, down, _ in found]), whole[1] @ whole[2])
    assert all(down.shape[0] == 2 for _, _, down, _ in found)


def test_a_written_file_has_folded_pairs_at_the_same_rank_and_reads_back(tmp_path):
    pairs = [pair(f"{BLOCK}.attn.to_qkv_mlp", 56), pair(f"{BLOCK}.proj_out", 8, 40)]
    writer.write(tmp_path / "a.safetensors", pairs, family="flux1", dtype="fp32", metadata={})
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 10 and not any("alpha" in name for name in tensors)
    assert tensors[f"{BLOCK}.proj_mlp.lora_B.weight"].shape == (32, 2)
    comparison = verify.compare(tmp_path / "a.safetensors", pairs, family="flux1")
    assert comparison.unmatched == [] and comparison.worst_rel_error < 1e-6
    other = [(name, up + 1, down, None) for name, up, down, _ in pairs]
    assert verify.compare(tmp_path / "a.safetensors", other, family="flux1").worst_rel_error > 0.1


def test_a_file_comes_together_as_it_came_apart():
    name, up, down, _ = pair(f"{BLOCK}.attn.to_qkv_mlp", 56)
    other = pair(f"{BLOCK}.proj_out", 8, 40)
    modules = {part: tuple(rest) for part, *rest in apart([(name, up, down, None), other])}
    found = together(modules, {name: [8, 8, 8, 32], f"{BLOCK}.attn.to_qkv": [8, 8, 8]})
    assert found.keys() == {name, other[0]}
    assert torch.equal(found[name][0], up) and torch.equal(found[name][1], down)


def test_parts_of_their_own_ranks_come_together_with_the_same_change():
    name, parts = f"{BLOCK}.attn.to_qkv", ("to_q", "to_v")
    modules = {f"{BLOCK}.attn.{part}": pair("", 8)[1:] for part in parts}
    (up, down, _), = together(modules, {name: [8, 8, 8]}).values()
    q, v = (modules[f"{BLOCK}.attn.{part}"] for part in parts)
    torch.testing.assert_close(up @ down, torch.cat([q[0] @ q[1], torch.zeros(8, 8), v[0] @ v[1]]))
    assert up.shape == (24, 4)


KLEIN = {"guidance_embeds": False}


@pytest.mark.parametrize(("sizes", "family", "linears", "accepted_count"), [
    ("flux1", "flux1", 504, 504), ("flux2_dev", "flux2", 203, 196), ("klein4b", "flux2", 109, 104),
    ("klein9b", "flux2", 153, 148)])
def test_every_linear_of_the_true_models_has_the_key_that_comfyui_accepts(sizes, family, linears, accepted_count):
    accepted = json.loads(gzip.decompress(GOLDEN.read_bytes()))[sizes]
    changes = {"klein4b": dict(num_attention_heads=24, num_layers=5, num_single_layers=20, joint_attention_dim=7680),
               "klein9b": dict(num_attention_heads=32, num_layers=8, num_single_layers=24, joint_attention_dim=12288)}
    kind, module = (FluxTransformer2DModel, flux1) if family == "flux1" else (Flux2Transformer2DModel, flux2)
    config = module._template("transformer") | (changes[sizes] | KLEIN if sizes in changes else {})
    with torch.device("meta"):
        model = kind.from_config(config)
    layers = {f"transformer.{name}": layer for name, layer in model.named_modules()
              if isinstance(layer, torch.nn.Linear)}
    keys = {names.key_of(path, family): layer for path, layer in layers.items()}
    assert len(keys) == len(layers) == linears and None not in keys
    reached = {key: accepted[key] for key in keys if key in accepted}
    assert len(reached) == accepted_count
    for key, (_, shape, part, *_) in reached.items():
        rows = part[2] if isinstance(part, list) else shape[0]
        assert list(keys[key].weight.shape) == [rows, shape[1]], key
    assert all("_blocks." not in key for key in keys.keys() - accepted.keys())  # what a LoRA trains is all accepted
