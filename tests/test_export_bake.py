"""LoRAs in base models: equal to diffusers' fuse_lora for every family, in every layout, in bounded memory."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import lora_bases, lora_models
from trainer.errors import UserError
from trainer.export import texts
from trainer.export.bake import bake
from trainer.export.extract import extract

GROUPS = {"sd15": ("all", "text_encoder"), "sdxl": ("all", "text_encoder"), "flux1": ("all",), "klein": ("all",),
          "dev": ("all",)}


@pytest.fixture(scope="module", params=GROUPS)
def case(request, tmp_path_factory):
    """A model's folder, two LoRAs for it with their weights, and the folder that diffusers makes of them."""
    model, path = request.param, tmp_path_factory.mktemp(request.param)
    first = lora_bases.lora(path / "first.safetensors", model, GROUPS[model])
    second = lora_bases.lora(path / "second.safetensors", model, ("attention",), seed=9)
    files = {first: 0.7, second: -1.5}
    wanted = lora_bases.folder(path / "wanted", model, lora_bases.fused(model, files))
    return model, lora_bases.folder(path / "base", model), files, wanted


def assert_alike(found, wanted, base):
    """Every tensor, within fp32's rounding of the sums."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, at=name: f"{at} {text}")
    assert any(not torch.equal(found[name], tensor) for name, tensor in base.items())


def test_a_folder_is_what_diffusers_fuses(case, tmp_path):
    model, base, files, wanted = case
    done = bake(base, list(files), list(files.values()), tmp_path / "out")
    assert done.left_out == [] and done.changed > 0
    for name, module in lora_models.parts(model).items():
        stored = lora_bases.stored(tmp_path / "out" / name)
        assert_alike(stored, lora_bases.stored(wanted / name), lora_bases.stored(base / name))
        type(module).from_pretrained(tmp_path / "out" / name)
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text() == "{}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]  # no draft is left


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_single_file_keeps_its_authors_layout(case, tmp_path, prefix):
    model, base, files, wanted = case
    before = lora_bases.file(tmp_path / "base.safetensors", base, model, prefix)
    after = lora_bases.file(tmp_path / "wanted.safetensors", wanted, model, prefix)
    bake(before, list(files), list(files.values()), tmp_path / "out.safetensors")
    assert_alike(load_file(tmp_path / "out.safetensors"), load_file(after), load_file(before))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.title"] == "tiny" and said["modelspec.merged_from"] == "base, first, second"
    [step] = texts.history(said)
    assert step["base"] == "base.safetensors" and [one["weight"] for one in step["from"]] == [0.7, -1.5]
    assert all(len(one["hash"]) == 64 for one in step["from"])


@pytest.mark.parametrize("model", ["flux1", "klein"])
def test_the_last_norms_halves_lie_as_in_the_file(tmp_path, model):
    """diffusers' scale and shift are the authors' shift and scale, going in by `bake` and coming out by `extract`."""
    base = lora_bases.folder(tmp_path / "base", model)
    single = lora_bases.file(tmp_path / "single.safetensors", base, model)
    key, generator = "transformer.norm_out.linear", torch.Generator().manual_seed(0)
    m, n = lora_models.weights(model)[f"{key}.weight"].shape
    up, down = torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "a.safetensors",
              {"ss_base_model_version": lora_models.SIZES[model]})
    for source, out in ((base, "out"), (single, "out.safetensors")):
        bake(source, [tmp_path / "a.safetensors"], [], tmp_path / out)
    wanted = lora_bases.file(tmp_path / "wanted.safetensors", tmp_path / "out", model)
    assert_alike(load_file(tmp_path / "out.safetensors"), load_file(wanted), load_file(single))
    extract(single, tmp_path / "out.safetensors", tmp_path / "b.safetensors", rank=2, dtype="fp32")
    found = load_file(tmp_path / "b.safetensors")
    torch.testing.assert_close(found[f"{key}.lora_B.weight"] @ found[f"{key}.lora_A.weight"], up @ down, rtol=1e-4,
                               atol=1e-5)


def test_shards_stay_shards_and_other_copies_of_the_weights_go(tmp_path):
    base = lora_bases.folder(tmp_path / "base", "klein", shard="20KB")
    shards = sorted(path.name for path in (base / "transformer").iterdir())
    assert len(shards) > 4
    (base / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    lora = lora_bases.lora(tmp_path / "a.safetensors", "klein", ("all",), "F6")
    bake(base, [lora], [], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "transformer").iterdir()) == shards
    whole = lora_bases.folder(tmp_path / "whole", "klein")
    bake(whole, [lora], [], tmp_path / "other")
    assert_alike(lora_bases.stored(tmp_path / "out" / "transformer"), lora_bases.stored(tmp_path / "other/transformer"),
                 lora_bases.stored(base / "transformer"))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_is_merged_as_it_is_meant(tmp_path, strength):
    base = lora_bases.folder(tmp_path / "base", "sdxl")
    adapter = lora_models.adapter("sdxl", ("all",), "lora", dora=True)
    lora = lora_bases.lora(tmp_path / "a.safetensors", "sdxl", ("all",), dora=True)
    bake(base, [lora], [strength], tmp_path / "out")
    before, found = lora_bases.stored(base / "unet"), lora_bases.stored(tmp_path / "out" / "unet")
    for name, wanted in lora_models.expected("sdxl", adapter).items():
        if name.startswith("unet."):
            plain = before[name.removeprefix("unet.")].double()
            torch.testing.assert_close(found[name.removeprefix("unet.")].double(), plain + strength * (wanted - plain),
                                       rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_once(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(54, 6).half()
    save_file({"double_stream_modulation_img.lin.weight": torch.ones(2, 2), "single_blocks.0.linear1.weight": weight,
               "odd.ids": torch.arange(3)}, tmp_path / "base.safetensors")
    up, down = torch.randn(54, 2), torch.randn(2, 6)
    save_file({"diffusion_model.single_blocks.0.linear1.lora_B.weight": up,
               "diffusion_model.single_blocks.0.linear1.lora_A.weight": down}, tmp_path / "a.safetensors")
    bake(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], [0.3], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    wanted = (weight.double() + 0.3 * up.double() @ down.double()).half()
    assert found["single_blocks.0.linear1.weight"].dtype == torch.float16
    assert (found["single_blocks.0.linear1.weight"] != wanted).float().mean() < 0.01  # ties of rounding
    assert torch.equal(found["odd.ids"], torch.arange(3))


def test_layers_of_an_absent_text_encoder_are_told(tmp_path):
    base = lora_bases.folder(tmp_path / "base", "sd15", {"unet": lora_models.parts("sd15")["unet"]})
    lora = lora_bases.lora(tmp_path / "a.safetensors", "sd15", ("attention", "text_encoder"))
    done = bake(base, [lora], [], tmp_path / "out")
    assert len(done.left_out) == 12 and done.left_out[0].startswith("text_encoder.text_model.encoder.layers.0.")


def refusals(path):
    """Name → (base, LoRA, out, message)."""
    sd15 = lora_bases.folder(path / "sd15", "sd15")
    own = lora_bases.lora(path / "own.safetensors", "sd15", ("attention",))
    klein = lora_bases.lora(path / "klein.safetensors", "klein", ("attention",))
    single = lora_bases.file(path / "single.safetensors", sd15, "sd15")
    key = "lora_unet_mid_block_attentions_0_proj_in"
    for name, shape, dora in (("large", 32, 0), ("output", 16, 16)):
        tensors = {f"{key}.lora_up.weight": torch.ones(shape, 2, 1, 1),
                   f"{key}.lora_down.weight": torch.ones(2, shape, 1, 1)}
        tensors |= {f"{key}.dora_scale": torch.ones(dora, 1, 1, 1)} if dora else {}
        save_file(tensors, path / f"{name}.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(single).items()},
              path / "fp8.safetensors")
    (path / "taken").mkdir()
    return {
        "another family": (sd15, klein, "x", "is for Flux.2 and .*sd15 is SD 1.5: give its own base"),
        "another size": (sd15, path / "large.safetensors", "x", "is 32 x 32 x 1 x 1, which has 16 x 16 x 1 x 1 in"),
        "output axis": (sd15, path / "output.safetensors", "x", "of the output axis"),
        "fp8": (path / "fp8.safetensors", own, "x", "keeps its weights as F8_E4M3.*use its bf16"),
        "a LoRA as base": (own, own, "x", "is a LoRA, not a base model"),
        "a base as LoRA": (sd15, single, "x", "cannot be read here"),
        "over itself": (single, own, "single.safetensors", "give another --out"),
        "over a folder": (sd15, own, "taken", "is there already"),
        "nothing": (path / "no", own, "x", "there is no file"),
        "weights": (sd15, own, "x", "1 files and 2 weights"),
    }


@pytest.mark.parametrize("name", ["another family", "another size", "output axis", "fp8", "a LoRA as base",
                                  "a base as LoRA", "over itself", "over a folder", "nothing", "weights"])
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, name):
    base, lora, out, message = refusals(tmp_path)[name]
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        bake(base, [lora], [1.0, 1.0] if name == "weights" else [], tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    base = lora_bases.file(tmp_path / "base.safetensors", lora_bases.folder(tmp_path / "f", "klein"), "klein")
    lora = lora_bases.lora(tmp_path / "a.safetensors", "klein", ("attention",))
    (tmp_path / "out.safetensors").write_bytes(b"old")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="the disk has 0.00 GB free"):
        bake(base, [lora], [], tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


PEAK = """
import re, sys
from pathlib import Path
from trainer.export.bake import bake
from trainer.export.extract import extract
base, lora, out = map(Path, sys.argv[1:])
bake(base, [lora], [], out)
extract(base, out, out.with_name("back.safetensors"), rank=4)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak(path, blocks):
    """Bytes that baking and extracting take at most, with a Flux.2 of so many blocks of 9.4 MB."""
    path.mkdir()
    width, rank = 512, 2
    shapes = {f"single_blocks.{i}.linear1": (9 * width, width) for i in range(blocks)}
    table = {"double_stream_modulation_img.lin.weight": torch.zeros(2, 2)}
    save_file(table | {f"{name}.weight": torch.full(shape, 0.5) for name, shape in shapes.items()},
              path / "base.safetensors")
    factors = {f"diffusion_model.{name}.lora_B.weight": torch.ones(shape[0], rank) for name, shape in shapes.items()}
    factors |= {f"diffusion_model.{name}.lora_A.weight": torch.ones(rank, shape[1]) for name, shape in shapes.items()}
    save_file(factors, path / "lora.safetensors")
    files = [path / f"{name}.safetensors" for name in ("base", "lora", "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in path.iterdir():
        file.unlink()
    return int(done.stdout) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """20 blocks more are 189 MB more of base, and 2 MB more of LoRA."""
    small, large = peak(tmp_path / "small", 4), peak(tmp_path / "large", 24)
    assert large - small < 60e6, f"{small / 1e6:.0f} and {large / 1e6:.0f} MB"


def test_the_command_line_says_what_it_did(tmp_path, capsys):
    from trainer.export.__main__ import main

    base = lora_bases.folder(tmp_path / "base", "klein")
    lora = lora_bases.lora(tmp_path / "a.safetensors", "klein", ("attention",))
    assert main(["bake", str(base), str(lora), "--weights", "0.5", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["changed"] == 20
    progress = [json.loads(line) for line in said.err.splitlines()]
    assert progress[-1]["done"] == progress[-1]["of"] > 10


def test_numbers_beyond_the_bases_precision_are_refused(tmp_path):
    base = lora_bases.file(tmp_path / "base.safetensors", lora_bases.folder(tmp_path / "f", "klein"), "klein")
    save_file({name: tensor.half() for name, tensor in load_file(base).items()}, base)
    lora = lora_bases.lora(tmp_path / "a.safetensors", "klein", ("attention",))
    with pytest.raises(UserError, match="not finite: the base is damaged, or the weights of the LoRAs are too large"):
        bake(base, [lora], [1e7], tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out*"))


def test_a_column_of_zeros_stays_with_dora(tmp_path):
    base = lora_bases.folder(tmp_path / "base", "klein")
    [file] = (base / "transformer").glob("*.safetensors")
    weights, key = load_file(file), "transformer_blocks.0.attn.to_out.0"
    weights[f"{key}.weight"][:, 3] = 0.0
    save_file(weights, file, {"format": "pt"})
    down = torch.ones(1, 32).index_fill(1, torch.tensor([3]), 0.0)
    save_file({f"transformer.{key}.lora_A.weight": down, f"transformer.{key}.lora_B.weight": torch.ones(32, 1),
               f"transformer.{key}.dora_scale": torch.ones(1, 32)}, tmp_path / "a.safetensors",
              {"ss_base_model_version": "flux2"})
    bake(base, [tmp_path / "a.safetensors"], [], tmp_path / "out")
    found = lora_bases.stored(tmp_path / "out" / "transformer")[f"{key}.weight"]
    assert not found[:, 3].any() and torch.allclose(found.norm(dim=0)[:3], torch.ones(3))


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_kill_in_the_middle_leaves_nothing(tmp_path, number):
    base = lora_bases.file(tmp_path / "base.safetensors", lora_bases.folder(tmp_path / "f", "klein"), "klein")
    large = {f"first_stage_model.{i}": torch.empty(2**25) for i in range(4)}  # half a GB takes a while
    save_file(load_file(base) | large, base)
    lora = lora_bases.lora(tmp_path / "a.safetensors", "klein", ("attention",))
    out = tmp_path / "out" / "x.safetensors"
    command = [sys.executable, "-m", "trainer.export", "bake", str(base), str(lora), "--out", str(out)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here would be ignored there
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        while process.poll() is None and not (out.parent.is_dir() and list(out.parent.iterdir())):
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert "stopped; nothing half-written was left behind" in said and process.returncode == 1
    assert list(out.parent.iterdir()) == []
