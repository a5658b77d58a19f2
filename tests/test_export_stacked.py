"""Adapters over stacked rows come apart into modules of the same rank, whose changes are rows of the stacked one."""

import pytest
import torch
from safetensors.torch import load_file

from trainer.export import verify, writer
from trainer.export.stacked import apart, together

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

