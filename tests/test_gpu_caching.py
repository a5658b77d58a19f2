"""Caching on a GPU: bytes become the numbers that they are on a CPU, and latents arrive whole although nobody waits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.data.cache import Cache
from trainer.data.dataset import scan, to_unit
from trainer.data.order import Draw
from trainer.data.store import LatentStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def slow(pixels: Tensor) -> Tensor:
    """Every eighth pixel, after enough work on the device for the host to run ahead."""
    product = torch.ones(2048, 2048, device=pixels.device)
    for _ in range(20):
        product = product @ product / 2048
    return pixels[..., ::8, ::8] * product[0, 0]


def test_bytes_have_the_same_bits_on_every_device() -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    assert torch.equal(to_unit(values.cuda()).cpu(), to_unit(values))


def test_latents_of_a_gpu_are_those_of_a_cpu_however_far_the_host_runs_ahead(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02d}.png")
    items = scan([tmp_path / "images"]).items
    size, found = (64, 64), []
    for device, encode in (("cpu", lambda pixels: pixels[..., ::8, ::8].clone()), ("cuda", slow)):
        cache = Cache(tmp_path / device)
        store = LatentStore(items, [size] * 40, [[(0, 0)]] * 40, True, cache, "vae", torch.float32)
        assert store.fill(encode, 3, lambda done, of: None, lambda: False, lambda file, reason: None, device=device)
        found.append(store.latents([Draw(i, 0, 0, flip, 0) for i in range(40) for flip in (False, True)], "cpu"))
    assert torch.equal(*found)
