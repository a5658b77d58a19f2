"""What a run will take of the GPU's memory, of the computer's and of the disk, told before it starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer import families
from trainer.data.cache import Cache
from trainer.data.store import MEMORY, LatentStore, TextStore
from trainer.families.base import quantised_id
from trainer.material import Material
from trainer.memory.blocks import repeated_blocks
from trainer.memory.choice import remembered
from trainer.memory.estimate import EMA, HELD, STATE, Estimate, Estimator
from trainer.memory.plan import FULL, Plan, plain, rungs, text_rungs
from trainer.memory.trace import META
from trainer.memory.weights import bytes_of
from trainer.quantize.available import works
from trainer.schema import Preset
from trainer.session import LATENT_DTYPE, pick_dtype

PROGRAM = int(2.5 * 2**30)  # of the computer's memory: Python, torch, CUDA's libraries, a weight on its way


@dataclass(frozen=True)
class Memory:
    """What training takes, in bytes, and how the model is held for it."""

    plan: Plan
    blocks: int
    estimate: Estimate
    measured: int | None  # peak of an earlier run like this
    text: int  # the text encoder's weights while it encodes the captions; 0: nothing is to be encoded
    text_mode: str

    @property
    def peak(self) -> int:
        """What tensors take on the device, in training or before it."""
        return max(self.measured or self.estimate.peak, self.text)


@dataclass(frozen=True)
class Disk:
    """What will be written, in bytes."""

    caches: int  # what the cache lacks now
    texts: int  # prompts among it
    checkpoints: int  # with their exports, as many as are kept
    free: int


def memory(preset: Preset, base: Any, denoiser: nn.Module, material: Material, device: torch.device, limit: int | None,
           known: Mapping[str, Any] | None, encodes: bool, gpus: int = 1) -> Memory:
    """The plan that the run will choose, and what it takes.

    denoiser: its skeleton on the meta device. limit: bytes of the GPU that the run may take, None on a device whose
    memory is not counted. known: what `speed.recall` has. encodes: whether captions are still to be encoded. gpus: on
    which the run trains, taken to be in one computer.
    """
    blocks, trained, mode, text = len(repeated_blocks(denoiser)), None, "none", 0
    if "text_encoder" in preset.adapter.targets or encodes:
        family = families.get(preset.model.family)
        encoder = family.load_text_encoder(base, META, family.TEXT_DTYPE)
        if encodes:
            mode, text = _encoding(preset, encoder, family.TEXT_DTYPE, device, limit)
        else:
            trained = encoder
    estimator = Estimator(preset, denoiser, pick_dtype(preset, device), largest(material), trained, device, gpus)
    if limit is None:
        plan = plain(preset, blocks, gpus)
        return Memory(plan, blocks, estimator(plan), None, text, mode)
    ladder = [plan for plan in rungs(preset, blocks, gpus) if works(plan.quantize, device)]
    if earlier := remembered(dict(known or {}), ladder, limit):
        return Memory(earlier[0], blocks, estimator(earlier[0]), (known or {})["peak"], text, mode)
    plan = next((plan for plan in ladder if estimator.fits(plan, FULL * limit)), ladder[-1])
    return Memory(plan, blocks, estimator(plan), None, text, mode)


def _encoding(preset: Preset, encoder: nn.Module, dtype: torch.dtype, device: torch.device,
              limit: int | None) -> tuple[str, int]:
    """How the text encoder will be held while it encodes, and its bytes then."""
    sizes = {mode: bytes_of(encoder, mode, dtype) for mode in text_rungs(preset.memory) if works(mode, device)}
    mode = next((mode for mode in sizes if limit is None or sizes[mode] <= FULL * limit), list(sizes)[-1])
    return mode, sizes[mode]


def largest(material: Material) -> tuple[int, int]:
    """Width and height of the largest pictures of a training set."""
    return max((material.size(item) for item in material.train), key=math.prod)


def host_bytes(found: Memory, cached: int) -> int:
    """What the run takes of the computer's memory; cached: bytes of latents and embeddings, kept as far as they fit."""
    return PROGRAM + found.estimate.host + min(cached, 2 * MEMORY)


def texts_to_encode(preset: Preset, base: Any, material: Material, cache: Cache, dtype: torch.dtype, mode: str) -> int:
    """How many prompts the cache lacks."""
    if "text_encoder" in preset.adapter.targets:
        return 0
    return len(TextStore(material.prompts(), cache, quantised_id(base.text_id, mode), dtype).missing())


def disk(preset: Preset, base: Any, material: Material, cache: Cache, dtype: torch.dtype, texts: int,
         trained: int) -> Disk:
    """What the run will write. texts: prompts that the cache lacks; trained: numbers in the adapter."""
    family = families.get(preset.model.family)
    config = base.parts[family.DENOISER].config
    prompt = sum(math.prod(shape) for shape in family.prompt_shapes(config).values()) * dtype.itemsize
    stores = (material.latent_store(items, cache, base.vae_id, LATENT_DTYPE, training=training)
              for items, training in ((material.trained, True), (material.held, False)))
    latents = sum(_latent_bytes(preset, store) for store in stores)
    state = HELD - 4 + STATE[preset.train.optimizer] + (EMA if preset.train.ema_decay else 0)  # without gradients
    exported = 4 if preset.output.dtype == "fp32" else 2
    kept = preset.output.keep + 2  # the best, and the one that is being written
    where = next(folder for folder in (cache.root, *cache.root.parents) if folder.exists())
    return Disk(latents + texts * prompt, texts * prompt, trained * (state * kept + exported * (kept + 1)),
                shutil.disk_usage(where).free)


def _latent_bytes(preset: Preset, store: LatentStore) -> int:
    shape = families.get(preset.model.family).latent_shape
    return sum(math.prod(shape(*store.sizes[job.item])) * LATENT_DTYPE.itemsize for job in store.missing())
