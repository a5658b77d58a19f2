"""What a written file holds, that diffusers reads it at the right strength, and that it is whole or not there."""

import hashlib
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.errors import UserError
from trainer.export import names
from trainer.export.writer import save, write

ROUNDING = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OUT_PROJ = "text_encoder.text_model.encoder.layers.1.self_attn.out_proj"


def pair(name, m=8, n=12, rank=2, scale=1.0, seed=0, kernel=0, dora=False):
    """A random (name, up, down, magnitude)."""
    generator = torch.Generator().manual_seed(seed)
    tail = (kernel, kernel) if kernel else ()
    up = torch.randn(m, rank, *(1,) * len(tail), generator=generator) * scale
    magnitude = torch.rand(1, n, *(1,) * len(tail), generator=generator) if dora else None
    return name, up, torch.randn(rank, n, *tail, generator=generator) * scale, magnitude


def export(path, pairs, dtype="fp32", **metadata):
    return write(path, pairs, family="sd15", dtype=dtype, metadata=metadata)


def header(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length]), content[8 + length:]


def delta(up, down):
    return up.double().flatten(1) @ down.double().flatten(1)


@pytest.fixture
def pipeline():
    """StableDiffusionPipeline with a UNet and a CLIP that are tiny but of SD1.5's make."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, cross_attention_dim=24, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=3,
                                        num_attention_heads=4, vocab_size=100, bos_token_id=98, eos_token_id=99))
    return StableDiffusionPipeline(
        vae=None, text_encoder=clip, tokenizer=None, unet=unet, scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def layers(pipeline, wanted):
    """Export name → module of the pipeline's Linear and Conv2d layers."""
    found = {}
    for component in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, component).named_modules():
            path = f"{component}.{name}"
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and wanted(path):
                found[path] = module
    return found


def random_pairs(modules, rank=4):
    pairs = []
    for i, (name, module) in enumerate(modules.items()):
        kernel = module.kernel_size[0] if isinstance(module, torch.nn.Conv2d) else 0
        m, n = module.weight.shape[:2]
        pairs.append(pair(name, m, n, rank=1 + i % rank, scale=0.1, seed=i, kernel=kernel))
    return pairs


@pytest.mark.parametrize("dtype", ROUNDING)
def test_diffusers_fuses_exactly_our_delta_and_leaves_no_key(tmp_path, pipeline, dtype):
    modules = layers(pipeline, lambda path: path.startswith("text_encoder") or ".attentions." in path)
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    pairs = random_pairs(modules)
    written = export(tmp_path / "style.safetensors", pairs, dtype)
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    adapted = [name for part in (pipeline.unet, pipeline.text_encoder) for name, _ in part.named_modules()
               if name.endswith(".lora_A.default_0")]
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = layers(pipeline, lambda path: path in modules)
    for name, up, down, _ in pairs:
        expected = delta(up, down).view_as(before[name])
        error = (after[name].weight.double() - before[name] - expected).norm() / expected.norm()
        assert error < ROUNDING[dtype], name
    assert len(adapted) == len(pairs) == 6 * 12 + 3 * 6 and written.rank == 4 and written.unmatched == []


def test_every_layer_of_the_unet_reaches_diffusers(tmp_path, pipeline):
    modules = layers(pipeline, lambda path: path.startswith("unet."))
    pairs = random_pairs(modules)
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    assert export(tmp_path / "all.safetensors", pairs).unmatched == []
    pipeline.load_lora_weights(tmp_path, weight_name="all.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = layers(pipeline, lambda path: path in modules)
    for name, up, down, _ in pairs:
        expected = delta(up, down).view_as(before[name])
        torch.testing.assert_close(after[name].weight - before[name], expected.float(), rtol=1e-4, atol=1e-6)


def test_one_trained_projection_of_a_text_encoder_is_not_dropped(tmp_path, pipeline):
    modules = layers(pipeline, lambda path: path.endswith("layers.1.self_attn.q_proj") or path.endswith("0.mlp.fc1"))
    pairs = random_pairs(modules)
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    export(tmp_path / "q.safetensors", pairs)
    pipeline.load_lora_weights(tmp_path, weight_name="q.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = layers(pipeline, lambda path: path in modules)
    assert len(pairs) == 2
    for name, up, down, _ in pairs:
        expected = delta(up, down).float()
        torch.testing.assert_close(after[name].weight - before[name], expected, rtol=1e-4, atol=1e-6)


def test_clip_layers_hold_all_four_projections_zero_where_untrained(tmp_path):
    export(tmp_path / "a.safetensors", [pair(OUT_PROJ, 12, 12)])
    tensors = load_file(tmp_path / "a.safetensors")
    ups = {key: up for key, up in tensors.items() if key.endswith(".lora_up.weight")}
    assert sorted(ups) == [f"lora_te_text_model_encoder_layers_1_self_attn_{part}_proj.lora_up.weight"
                           for part in ("k", "out", "q", "v")]
    assert [key for key, up in ups.items() if up.any()] == [k for k in ups if "out_proj" in k]


def test_ranks_and_alphas_are_alike_and_padding_changes_nothing(tmp_path):
    pairs = [pair(TO_Q, rank=2), pair("unet.conv_in", rank=5, kernel=3, seed=1)]
    written = export(tmp_path / "a.safetensors", pairs)
    tensors = load_file(tmp_path / "a.safetensors")
    assert written.rank == 5 and written.tensors == len(tensors) == 6
    for name, up, down, _ in pairs:
        key = names.naming("sd15", "kohya").of(name).key
        alpha = tensors[f"{key}.alpha"]
        assert alpha.shape == () and alpha.dtype == torch.float32 and alpha.item() == 5
        assert tensors[f"{key}.lora_up.weight"].shape[1] == tensors[f"{key}.lora_down.weight"].shape[0] == 5
        torch.testing.assert_close(
            delta(tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]), delta(up, down))
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (5, 12, 3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape == (8, 5, 1, 1)


@pytest.mark.parametrize("dtype, expected", [("fp16", torch.float16), ("bf16", torch.bfloat16),
                                             ("fp32", torch.float32), ("auto", torch.float16)])
def test_weights_have_the_chosen_dtype(tmp_path, dtype, expected):
    export(tmp_path / "a.safetensors", [pair(TO_Q, dora=True)], dtype)
    tensors = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for key, t in tensors.items() if key.endswith(".weight")} == {expected}
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".weight")} == {torch.float32}


@pytest.mark.parametrize(("dtype", "most"), [("fp16", 1e-3), ("bf16", 8e-3)])
def test_dora_in_half_precision_moves_the_weights_by_what_it_was_trained_to(tmp_path, dtype, most):
    """m (W + ΔW) / |W + ΔW| of the file against the adapter's, by the change, of which W is ten thousand times."""
    name, up, down, _ = pair(TO_Q, 64, 48, scale=0.01)
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    magnitude = (weight + up @ down).norm(dim=0, keepdim=True) * 1.0001
    export(tmp_path / "a.safetensors", [(name, up, down, magnitude)], dtype)
    tensors = {key.removeprefix(f"{KEY_Q}."): tensor.float()
               for key, tensor in load_file(tmp_path / "a.safetensors").items()}

    def merged(up, down, magnitude):
        moved = weight + up @ down
        return moved * (magnitude / moved.norm(dim=0, keepdim=True))

    meant = merged(up, down, magnitude)
    stored = merged(tensors["lora_up.weight"], tensors["lora_down.weight"], tensors["dora_scale"])
    assert (stored - meant).norm() < most * (meant - weight).norm()


def test_dora_lies_on_the_input_axis(tmp_path):
    pairs = [pair(TO_Q, dora=True), pair("unet.conv_in", kernel=3, dora=True)]
    export(tmp_path / "a.safetensors", pairs)
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors[f"{KEY_Q}.dora_scale"].shape == (1, 12)
    assert tensors["lora_unet_conv_in.dora_scale"].shape == (1, 12, 1, 1)
    assert torch.equal(tensors[f"{KEY_Q}.dora_scale"], pairs[0][3])


def test_a_young_adapters_small_weights_survive_fp16(tmp_path):
    _, up, down, _ = pair(TO_Q)
    export(tmp_path / "a.safetensors", [(TO_Q, up * 1e-6, down, None)], "fp16")
    tensors = load_file(tmp_path / "a.safetensors")
    stored = delta(tensors[f"{KEY_Q}.lora_up.weight"], tensors[f"{KEY_Q}.lora_down.weight"])
    expected = delta(up * 1e-6, down)
    assert (stored - expected).norm() < 1e-3 * expected.norm()


def test_hashes_are_of_the_tensor_data(tmp_path):
    written = export(tmp_path / "a.safetensors", [pair(TO_Q), pair(OUT_PROJ, 12, 12)], "fp16", note="one")
    table, data = header(written.path)
    digest = hashlib.sha256(data).hexdigest()
    assert written.model_hash == table["__metadata__"]["sshs_model_hash"] == digest
    assert table["__metadata__"]["modelspec.hash_sha256"] == f"0x{digest}"
    library = save_bytes(load_file(written.path))  # the hash of anybody who writes these tensors by safetensors
    (length,) = struct.unpack("<Q", library[:8])
    assert hashlib.sha256(library[8 + length:]).hexdigest() == digest


@pytest.mark.parametrize("rows", [8, 300_000])
def test_the_legacy_hash_is_that_of_sd_scripts(tmp_path, rows):
    """64 KiB at 1 MiB of the file with `ss_*` metadata alone; of a short file, of nothing."""
    written = export(tmp_path / "a.safetensors", [pair(TO_Q, m=rows), pair(OUT_PROJ, 12, 12)], ss_seed="7", other="x")
    library = save_bytes(load_file(written.path), {"ss_seed": "7", "ss_output_name": "a"})
    expected = hashlib.sha256(library[0x100000:0x110000]).hexdigest()[:8]
    assert header(written.path)[0]["__metadata__"]["sshs_legacy_hash"] == expected
    assert (len(library) > 0x110000) == (rows > 8)


def test_same_weights_give_the_same_bytes_and_hashes_ignore_names(tmp_path):
    first = export(tmp_path / "a.safetensors", [pair(TO_Q), pair(OUT_PROJ, 12, 12)], note="ü")
    content = first.path.read_bytes()
    again = export(tmp_path / "a.safetensors", [pair(OUT_PROJ, 12, 12), pair(TO_Q)], note="ü")
    other = export(tmp_path / "b-000500.safetensors", [pair(TO_Q), pair(OUT_PROJ, 12, 12)])
    assert again.path.read_bytes() == content and first.bytes == len(content)
    assert other.model_hash == first.model_hash
    with safe_open(other.path, "pt") as file:
        assert file.metadata()["ss_output_name"] == "b-000500"
    with safe_open(first.path, "pt") as file:
        assert file.metadata()["note"] == "ü"


def test_the_header_opens_as_uis_want_it_and_data_is_aligned(tmp_path):
    written = export(tmp_path / "a.safetensors", [pair(TO_Q, m=7, n=5, rank=3), pair(OUT_PROJ, 5, 5)], "fp16")
    content = written.path.read_bytes()
    table, data = header(written.path)
    assert content[8:10] == b'{"' and (len(content) - len(data)) % 8 == 0
    for name, entry in table.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0, name


def test_a_file_of_every_module_has_a_header_under_a_megabyte(tmp_path):
    places = [row.modules[0].replace("#", str(i)) for row in names.naming("sd15", "kohya").rows for i in range(4)]
    written = export(tmp_path / "a.safetensors", [pair(p, 1, 1, 1) for p in dict.fromkeys(places)], pad="x" * 300_000)
    assert len(written.path.read_bytes()) < 1 << 20


def test_modules_without_a_name_are_reported_and_not_written(tmp_path):
    written = export(tmp_path / "a.safetensors", [pair(TO_Q), pair("unet.something.else")])
    assert written.unmatched == ["unet.something.else"] and written.tensors == 3
    with pytest.raises(UserError, match="no module that a sd15 file can name"):
        export(tmp_path / "b.safetensors", [pair("unet.something.else")])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    _, up, down, _ = pair(TO_Q)
    up[0, 0] = value
    with pytest.raises(UserError, match=f"a.safetensors was not written: the weights of {TO_Q} are not finite"):
        export(tmp_path / "a.safetensors", [(TO_Q, up, down, None)])
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_are_written(tmp_path):
    _, up, _, _ = pair(TO_Q, 8, 8, 4)
    export(tmp_path / "a.safetensors", [(TO_Q, up, up.T, None), (TO_Q.replace("to_q", "to_k"), up, up.T, None)])
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors[f"{KEY_Q}.lora_down.weight"], up.T)


WRITE_UNDER_A_LIMIT = """
import sys, torch
from pathlib import Path
from trainer.errors import UserError
from trainer.export.writer import write
pairs = [("unet.conv_in", torch.ones(4000, 8), torch.ones(8, 4000), None)]
try:
    write(Path(sys.argv[1]), pairs, family="sd15", dtype="fp32", metadata={})
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    export(path, [pair(TO_Q)])
    old = path.read_bytes()

    resource = pytest.importorskip("resource")

    def limit():  # a file that may not grow fails in the middle, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run([sys.executable, "-c", WRITE_UNDER_A_LIMIT, path], preexec_fn=limit, text=True,
                          capture_output=True, cwd=Path(__file__).parent.parent, check=True)
    assert f"{path} was not written: it needs 0.3 MB and the disk has" in done.stdout
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_larger_than_the_disk_is_refused_before_writing(tmp_path):
    vast = torch.zeros(1).expand(1 << 50)  # takes no memory
    with pytest.raises(UserError, match="it needs 4503599627.4 MB and the disk has"):
        save(tmp_path / "a.safetensors", {"a": vast}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_draft_of_another_process_stays(tmp_path):
    """Two may write one name at once: what gets that name is whole."""
    for name in (".a.safetensors.partial", ".a.safetensors.1.partial"):
        (tmp_path / name).write_bytes(b"half")
    export(tmp_path / "a.safetensors", [pair(TO_Q)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.safetensors.1.partial", ".a.safetensors.partial", "a.safetensors"]
    export(tmp_path / f"{'x' * 240}.safetensors", [pair(TO_Q)])
