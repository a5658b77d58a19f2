"""What a run will take of a GPU: the plan it will choose, and what is known of earlier runs."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from trainer import families, forecast
from trainer import preset as presets
from trainer.data.cache import Cache
from trainer.material import Material
from trainer.memory.plan import LADDER, Plan
from trainer.session import open_base

CPU = torch.device("cpu")
PLENTY = 1 << 40


@pytest.fixture
def foresee(tiny_project):
    """The forecast of a tiny project for a GPU that lets a run take so many bytes."""

    def memory(limit: int | None, *changes: str, known: dict | None = None, encodes: bool = False,
               gpus: int = 1) -> forecast.Memory:
        preset = presets.load(tiny_project, changes)
        family, base = families.get("sd15"), open_base(preset)
        denoiser = family.load_denoiser(base, torch.device("meta"), torch.float32)
        return forecast.memory(preset, base, denoiser, Material(preset, 8), CPU, limit, known, encodes, gpus)

    return memory


def test_with_room_enough_nothing_is_saved(foresee) -> None:
    found = foresee(PLENTY)
    assert found.plan == Plan() and found.measured is None and found.peak == found.estimate.peak
    assert found.estimate.weights > 9e6  # 2.5 M in fp32


def test_the_first_plan_that_fits_is_told(foresee) -> None:
    free = foresee(PLENTY).peak
    tighter = foresee(free)  # less than all of it: gaps between tensors take some
    assert tighter.plan != Plan() and tighter.peak < free
    smallest = foresee(1)
    assert smallest.plan.offload_blocks == smallest.blocks - 1 == 15
    assert smallest.estimate.host > 0


def test_several_gpus_share_what_does_not_fit_one(foresee) -> None:
    whole, shared = foresee(PLENTY, "memory.gradient_checkpointing=full"), foresee(PLENTY, "memory.shard=on", gpus=2)
    assert shared.plan == Plan("none", "full", shards=2) and shared.estimate.host == 0
    assert shared.estimate.weights < whole.estimate.weights


def test_what_an_earlier_run_measured_counts_more(foresee) -> None:
    plan = Plan("nf4", "full")
    known = {"plan": asdict(plan), "peak": 12_345_678, "limit": 20_000_000, "ladder": LADDER}
    found = foresee(20_000_000, known=known)
    assert (found.plan, found.peak) == (plan, 12_345_678)
    assert foresee(PLENTY, known=known).plan == Plan()  # with much more room it will be measured anew


def test_the_text_encoder_can_be_what_takes_most(foresee) -> None:
    plain, encoding = foresee(PLENTY, "memory.gradient_checkpointing=full"), foresee(PLENTY, encodes=True)
    assert plain.text == 0 and encoding.text > 0 and encoding.text_mode == "none"
    assert foresee(encoding.text, encodes=True).text_mode == "fp8"
    trained = foresee(PLENTY, 'adapter.targets=["attention", "text_encoder"]')
    assert trained.estimate.weights == plain.estimate.weights + encoding.text


def test_latents_and_prompts_that_the_cache_lacks_are_counted(tiny_project, tmp_path) -> None:
    preset = presets.load(tiny_project)
    base, material = open_base(preset), Material(preset, 8)
    cache = Cache(tmp_path / "not" / "there" / "yet")
    found = forecast.disk(preset, base, material, cache, torch.float32, 10, 1000)
    prompt = 77 * base.parts["unet"].config["cross_attention_dim"] * 4
    assert preset.data.flip  # so that training images are cached mirrored too
    items = [*material.trained, *material.trained, *material.held]
    pictures = sum(4 * (width // 8) * (height // 8) * 4 for width, height in map(material.size, items))
    assert found.texts == 10 * prompt and found.caches == 10 * prompt + pictures
    assert found.checkpoints > 1000 * 4 * preset.output.keep and found.free > 0
