"""Pictures with a LoRA at a strength are those of a base that has it inside, for every family; without, the base's."""

import os

import numpy
import pytest
import torch
from torch import nn

from tests.family_runs import MAKERS
from trainer import adapters, families
from trainer.errors import UserError
from trainer.export.bake import bake
from trainer.export.metadata import BASES
from trainer.export.writer import write
from trainer.tryout import applied
from trainer.tryout import bench as benches
from trainer.tryout.bench import Bench
from trainer.tryout.task import Draw, Settings

SIDE = {"ss_resolution": "(64, 64)"}


def lora(path, base, name, *, dora=False, text=False, seed=3):
    """A LoRA of moved factors for every layer of a base's denoiser, and of its text encoder on request."""
    family = families.get(name)
    opened = family.open_base(str(base))
    models = {family.DENOISER: family.load_denoiser(opened, "cpu", torch.float32)}
    if text:
        models["text_encoder"] = family.load_text_encoder(opened, "cpu", torch.float32)
    targets = family.adapter_targets(models, ["all", *(["text_encoder"] if text else [])])
    made = adapters.build(targets, method="lora", rank=2, dora=dora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in made.parameters():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    about = {"ss_base_model_version": BASES[name].version, **SIDE}
    write(path, made.pairs("raw"), family=name, dtype="fp32", metadata=about)
    return path


def drawn(base, name, file, *, with_lora=True, told=None, **request):
    bench = Bench(Settings(family=name, base=str(base), device="cpu"), told or (lambda *_: None))
    draw = Draw(file=str(file), prompt="a red circle", steps=2, **request)
    return picture(bench, draw, with_lora)


def picture(bench, draw, with_lora=True):
    read = bench.lora(benches.Path(draw.file))
    return numpy.asarray(bench.picture(draw, read, bench.sampling(draw, read), "x", with_lora=with_lora)).astype(int)


CASES = [("sd15", {"text": True}), ("sd15", {"dora": True}), ("sdxl", {"text": True}), ("flux1", {}), ("flux2", {})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_picture_is_that_of_a_base_with_the_lora_inside(tmp_path, name, options):
    base = MAKERS[name](tmp_path / "base")
    file = lora(tmp_path / "a.safetensors", base, name, **options)
    for strength in (0.6, -0.5):
        inside = tmp_path / f"baked{strength}"
        bake(base, [file], [strength], inside)
        found = drawn(base, name, file, strength=strength)
        assert found.shape == (64, 64, 3)
        assert abs(found - drawn(inside, name, file, with_lora=False)).max() <= 1
    plain = drawn(base, name, file, with_lora=False)
    assert abs(found - plain).max() > 2
    assert (drawn(base, name, file, strength=0.0) == plain).all()


def test_one_bench_changes_strength_file_and_prompt_without_loading_again(tmp_path):
    base = MAKERS["sd15"](tmp_path / "base")
    files = [lora(tmp_path / "a.safetensors", base, "sd15", text=True),
             lora(tmp_path / "b.safetensors", base, "sd15", dora=True, seed=4)]
    told = []
    bench = Bench(Settings(family="sd15", base=str(base), device="cpu"), lambda name, *_: told.append(name))
    asked = [Draw(file=str(files[index]), prompt="a red circle", steps=2, strength=strength)
             for index, strength in ((0, 1.0), (1, 0.5), (0, 0.3), (0, 1.0))]
    first, *others, again = [picture(bench, draw) for draw in asked]
    assert (first == again).all()
    assert all((found == drawn(base, "sd15", draw.file, strength=draw.strength)).all()
               for draw, found in zip(asked[1:], others))
    assert told.count("loading the base model") == told.count("loading the text encoder") == 1
    assert told.count("reading the LoRA") == 2
    bench.park()  # on a GPU, all of it goes to the host
    assert (picture(bench, asked[0]) == first).all() and told.count("loading the base model") == 1
    assert (picture(bench, asked[0], with_lora=False) == drawn(base, "sd15", files[0], with_lora=False)).all()


def test_a_file_that_has_changed_is_read_again(tmp_path):
    base = MAKERS["sd15"](tmp_path / "base")
    file = lora(tmp_path / "a.safetensors", base, "sd15", text=True)
    bench = Bench(Settings(family="sd15", base=str(base), device="cpu"), lambda *_: None)
    draw = Draw(file=str(file), prompt="a red circle", steps=2)
    before = picture(bench, draw)
    os.utime(lora(file, base, "sd15", text=True, seed=9), ns=(1, 1))
    after = picture(bench, draw)
    assert (after != before).any() and (after == drawn(base, "sd15", file)).all()


def test_blocks_in_the_hosts_memory_draw_the_same_picture(tmp_path):
    base = MAKERS["flux2"](tmp_path / "base")
    file = lora(tmp_path / "a.safetensors", base, "flux2")
    bench = Bench(Settings(family="flux2", base=str(base), device="cpu"), lambda *_: None)
    bench._offloaded = 1
    assert (picture(bench, Draw(file=str(file), prompt="a red circle", steps=2)) == drawn(base, "flux2", file)).all()
    assert bench._offload is not None


def test_pictures_are_computed_as_their_settings_ask(exact, tmp_path):
    base, found = MAKERS["sd15"](tmp_path / "base"), []
    for precision in ("auto", "fp32"):
        Bench(Settings(family="sd15", base=str(base), device="cpu", precision=precision), lambda *_: None)
        found.append(torch.backends.cudnn.conv.fp32_precision)
    assert found == ["tf32", "ieee"]


def test_what_a_request_leaves_out_is_the_files_or_the_familys(tmp_path):
    base = MAKERS["sd15"](tmp_path / "base")
    file = lora(tmp_path / "a.safetensors", base, "sd15")
    bench = Bench(Settings(family="sd15", base=str(base), device="cpu"), lambda *_: None)
    read = bench.lora(file)
    assert vars(bench.sampling(Draw(file=str(file)), read)) == {"width": 64, "height": 64, "steps": 20, "guidance": 5.0}
    asked = Draw(file=str(file), width=100, height=72, steps=3, guidance=1.5)
    assert vars(bench.sampling(asked, read)) == {"width": 96, "height": 72, "steps": 3, "guidance": 1.5}


def test_a_lora_of_another_base_is_told(tmp_path):
    base, other = MAKERS["sd15"](tmp_path / "base"), MAKERS["sdxl"](tmp_path / "other")
    with pytest.raises(UserError, match="is for SDXL and the base model is SD 1.5"):
        drawn(base, "sd15", lora(tmp_path / "x.safetensors", other, "sdxl"))
    wide = tmp_path / "wide.safetensors"
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write(wide, [(name, torch.ones(96, 2), torch.ones(2, 96), None)], family="sd15", dtype="fp32", metadata={})
    with pytest.raises(UserError, match=r"to_q is 96 x 96 in it, and 64 x 64 in the base"):
        drawn(base, "sd15", wide)
    with pytest.raises(UserError, match="there is no file"):
        drawn(base, "sd15", tmp_path / "gone.safetensors")


def test_memory_that_runs_out_is_told(tmp_path, monkeypatch):
    base = MAKERS["sd15"](tmp_path / "base")
    file = lora(tmp_path / "a.safetensors", base, "sd15")

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(benches.sample, "draw", full)
    with pytest.raises(UserError, match="choose a smaller picture"):
        drawn(base, "sd15", file)


@torch.no_grad()
def test_a_column_of_zeros_without_magnitude_stays_so():
    linear = nn.Linear(4, 3, bias=False)
    linear.weight[:, 1] = 0.0
    change = applied.Change(torch.zeros(3, 1), torch.zeros(4, 1), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    layers = applied.Layers(families.get("sd15"), "unet", nn.Sequential(linear))
    read = applied.Lora(benches.Path("a"), "sd15", {"unet.0": change}, {}, 0)
    layers.put(read, 1.0, torch.device("cpu"), torch.float32)
    assert layers._model(torch.ones(1, 4)).isfinite().all()
