"""Tells whether an adapter is any good: validation loss, pictures for prompts, and distances to held-out images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from trainer import sample
from trainer.data import dataset
from trainer.data.buckets import Size, crop_offsets
from trainer.data.dataset import Item
from trainer.data.decoding import Decoders, processes_for
from trainer.data.order import stream
from trainer.data.store import LatentStore
from trainer.families.base import quantised_id
from trainer.material import FEWEST_HELD, framing, plain_draw
from trainer.metrics import distances
from trainer.metrics.features import Extractor, load_extractor
from trainer.objective import per_sample_loss
from trainer.session import Session, loaded

PIXELS_AT_ONCE = 2 * 512 * 512  # that go through the sampler together, and twice that with guidance
PICTURES_AT_ONCE = 8  # however small they are
FEATURES_AT_ONCE = 16


@torch.no_grad()
def validate(session: Session, step: int) -> float | None:
    """Validation loss on the first held-out images at fixed timestep quantiles, with fixed noise; None without any.

    Several processes share the work by batches, so that the numbers are those of one.
    """
    chosen = session.held_latents.readable()[: session.preset.evaluate.images]
    if not chosen:
        return None
    session.use(session.shown_weights)
    quantiles = session.objective.quantile_timesteps(session.preset.evaluate.quantiles)
    work = [(index, part) for index in range(len(quantiles)) for part in _batches(session, chosen)]
    shares = session.world.together(lambda: [
        (index, part, _losses_at(session, part, quantiles[index], index)) for index, part in session.world.part(work)])
    losses = torch.zeros(len(quantiles), len(session.held_latents.items))
    for index, part, found in (entry for share in shares for entry in share):
        losses[index, part] = found
    losses = losses[:, chosen]
    by_quantile = losses.double().mean(dim=1).tolist()  # losses: quantiles images
    loss = sum(by_quantile) / len(by_quantile)
    session.recorder.event("validation", step=step, loss=loss, by_quantile=[round(value, 6) for value in by_quantile])
    session.recorder.scalars(step, {"eval/loss": loss})
    session.progress.validation[str(step)] = loss
    session.progress.by_image[str(step)] = losses.double().mean(dim=0).tolist()
    return loss


def ground(session: Session) -> str:
    """A fingerprint of what validation losses are measured with: only those of one ground can be compared."""
    store, settings = session.held_latents, session.preset.evaluate
    items = [store.items[i] for i in store.readable()[: settings.images]]
    facts = [[item.sha256, session.material.held_caption(item), item.mask.sha256 if item.mask else ""]
             for item in items]
    base, preset = session.base, session.preset
    facts += [[base.denoiser_id, base.vae_id, base.text_id, session.shown_weights],
              [settings.quantiles, preset.train.seed, preset.data.resolution, preset.data.mask_background]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _batches(session: Session, chosen: Sequence[int]) -> Iterator[list[int]]:
    """Held-out images in batches of one size."""
    store, batch = session.held_latents, session.preset.train.batch_size
    for _, same in groupby(sorted(chosen, key=lambda i: (store.sizes[i], i)), key=lambda i: store.sizes[i]):
        items = list(same)
        yield from (items[start : start + batch] for start in range(0, len(items), batch))


def _losses_at(session: Session, part: Sequence[int], timestep: float, quantile: int) -> Tensor:
    """The loss of each image of a batch at one timestep, weighted by its mask as in training and by nothing else.  # b
    """
    session.guard()
    store, draws = session.held_latents, [plain_draw(i) for i in part]
    latents = store.latents(draws, session.device)
    seeds = [stream(session.preset.train.seed, i, f"validation {quantile}") for i in part]
    noise, drawn = session.objective.draw(seeds, latents.shape[1:], session.device, latents.dtype)
    timesteps = torch.full_like(drawn, timestep)
    texts = [session.material.held_caption(store.items[i]) for i in part]
    conditioning = session.conditioning(texts) | {"framing": framing(store, draws).to(session.device)}
    prediction = session.predict(latents, noise, timesteps, conditioning)
    target = session.objective.target(latents, noise, timesteps)
    loss = per_sample_loss(prediction, target, kind="mse", delta=1.0,
                           weights=session.pixel_weights(session.held_masks, draws))
    return loss.float().cpu()


def draw_samples(session: Session, step: int, weights: str, prompts: Sequence[str] | None = None,
                 asked: bool = False) -> None:
    """Pictures for the preset's prompts (or others), saved as `samples/000500_00.png` with their settings inside."""
    settings = session.preset.sample
    texts = list(prompts if prompts is not None else settings.prompts)
    if not texts:
        return
    started = time.monotonic()
    session.recorder.phase("drawing samples", 0, len(texts))
    session.world.together(lambda: session.encode_new(texts))
    seeds = [settings.seed + index for index in range(len(texts))]
    pictures = generate(session, texts, seeds, weights, "drawing samples")
    if not session.world.first:
        return
    folder = session.run.samples
    folder.mkdir(exist_ok=True)
    names, number = [], _asked_number(folder, step) if asked else None
    for index, picture in enumerate(pictures):
        path = folder / _name(step, index, number)
        _save_picture(path, picture, {"prompt": texts[index], "seed": seeds[index], "steps": settings.steps,
                                      "guidance": settings.guidance, "negative": settings.negative, "step": step})
        session.recorder.image(f"sample/{index}", path, picture.width, picture.height, step)
        names.append(f"samples/{path.name}")
    session.recorder.event("sample", step=step, images=names, prompts=texts, seed=settings.seed, weights=weights,
                           asked=asked, sec=round(time.monotonic() - started, 2))


def generate(session: Session, texts: Sequence[str], seeds: Sequence[int], weights: str,
             phase: str) -> list[Image.Image]:
    """One picture a prompt, with the sampler settings of the preset.

    Several processes draw a part each, by batches, so that the pictures are those of one; all get all of them.
    """
    resolution, world = session.preset.data.resolution, session.world
    width, height = session.preset.sample.width or resolution, session.preset.sample.height or resolution
    together = min(PICTURES_AT_ONCE, max(1, PIXELS_AT_ONCE // (width * height)))
    rows = [list(range(first, min(first + together, len(texts)))) for first in range(0, len(texts), together)]
    own = [row for batch in world.part(rows) for row in batch]
    drawn = world.together(lambda: _draw_part(session, texts, seeds, own, weights, phase, (width, height), together))
    shares = [iter(share) for share in drawn]
    return [next(shares[number % world.size]) for number, batch in enumerate(rows) for _ in batch]


def _draw_part(session: Session, texts: Sequence[str], seeds: Sequence[int], own: Sequence[int], weights: str,
               phase: str, size: Size, together: int) -> list[Image.Image]:
    """This process's part of the pictures: the rows `own`."""
    if not own:
        return []
    settings, (width, height) = session.preset.sample, size
    session.use(weights)
    conditioning = {name: rows[list(own)] for name, rows in session.conditioning(texts).items()}
    batches: list[Tensor] = []
    for latents in sample.draw(
            session.family, session.denoiser, session.objective, conditioning=conditioning,
            negative=session.conditioning([settings.negative]), seeds=[seeds[row] for row in own], steps=settings.steps,
            guidance=settings.guidance, width=width, height=height, device=session.device, dtype=session.dtype,
            batch_size=together, should_stop=session.guard):
        batches.append(latents)
        session.recorder.phase(phase, sum(map(len, batches)), len(own))
    with loaded(session.family.load_vae, session.base, session.device) as vae:
        return list(sample.decode(session.family, vae, batches))


def measure_distance(session: Session, step: int) -> None:
    """KID and FID-like distance of generated to held-out images, beside the base model's own (kept by hash)."""
    evaluate, held = session.preset.evaluate, _items(session.held_latents)
    if evaluate.distance == "off" or len(held) < FEWEST_HELD:
        return
    texts = [session.material.held_caption(held[i % len(held)]) for i in range(evaluate.generate)]
    seeds = [stream(session.preset.train.seed, i, "distance") & 0xFFFFFFFF for i in range(len(texts))]
    extractor = load_extractor(evaluate.distance, evaluate.inception_weights, session.device)
    if extractor.note:
        session.recorder.note(step, extractor.note)
    base = _base_features(session, extractor, texts, seeds)
    pictures = generate(session, texts, seeds, session.shown_weights, "generating images for KID and FID")
    if not session.world.first:
        return
    reference = _features_of_files(session, extractor, held)
    training = _features_of_files(session, extractor, [item for item in _items(session.latents) if not item.prior])
    result = distances.measure(reference, _features(extractor, pictures), training, extractor=extractor)
    before = distances.measure(reference, base, extractor=extractor)
    session.recorder.event("distance", step=step, **result, base_kid=before["kid"], base_kid_low=before["kid_low"],
                           base_kid_high=before["kid_high"], base_fd=before["fd"])
    session.recorder.scalars(step, {"eval/kid": result["kid"], "eval/fd": result["fd"]})


def _base_features(session: Session, extractor: Extractor, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Features of the base model's own pictures: the same for every run, so computed once; the first process's alone.
    """
    settings, data = session.preset.sample, session.preset.data
    products = [] if session.progress.matmul == "off" else [session.progress.matmul]
    key = session.cache.key("base pictures", quantised_id(session.base.denoiser_id, session.plan.quantize), *products,
                            session.base.vae_id, quantised_id(session.base.text_id, session.text_quantize),
                            extractor.name, extractor.resize, json.dumps([list(texts), list(seeds)]),
                            json.dumps(settings.model_dump(exclude={"prompts", "every", "before", "seed"})),
                            data.resolution, str(session.dtype), session.device.type)
    if (stored := session.world.from_first(lambda: session.cache.get(key))) is None:
        pictures = generate(session, texts, seeds, "off", "generating the base model's own images")
        if not session.world.first:
            return torch.zeros(0)
        stored = {"features": _features(extractor, pictures)}
        session.cache.put(key, stored)
    return stored["features"]


def _items(store: LatentStore) -> list[Item]:
    return [store.items[i] for i in store.readable()]


def _features_of_files(session: Session, extractor: Extractor, items: Sequence[Item]) -> Tensor:
    """Features of images on the disk, at the size they are trained at; kept by hash."""
    sizes = [session.material.size(item) for item in items]
    digest = hashlib.sha256("\n".join(f"{item.sha256} {size}" for item, size in zip(items, sizes)).encode()).hexdigest()
    key = session.cache.key("image features", digest, extractor.name, extractor.resize)
    if (stored := session.cache.get(key)) is None:
        stored = {"features": extractor.of(_middles(session, items, sizes), FEATURES_AT_ONCE)}
        session.cache.put(key, stored)
    return stored["features"]


def _middles(session: Session, items: Sequence[Item], sizes: Sequence[Size]) -> Iterator[Tensor]:
    """The middle crop of each image.  # h w 3, uint8"""
    files = [dataset.wanted(item, size) for item, size in zip(items, sizes)]
    with Decoders(processes_for(files)) as decoders:
        for index, (item, size, picture) in enumerate(zip(items, sizes, decoders.pictures(files))):
            session.guard()
            session.recorder.phase("features of images", index, len(items))
            offset, = crop_offsets(item.width, item.height, size, crop="center", variants=1, sha256=item.sha256, seed=0)
            yield torch.from_numpy(dataset.crop_picture(picture.result(), size, offset, False).copy())


def _features(extractor: Extractor, pictures: Sequence[Image.Image]) -> Tensor:
    return extractor.of((torch.from_numpy(numpy.array(picture)) for picture in pictures), FEATURES_AT_ONCE)


def _name(step: int, index: int, asked: int | None) -> str:
    """`000500_00.png`; pictures asked for in between never replace those of the matrix."""
    return f"{step:06d}_{index:02d}.png" if asked is None else f"{step:06d}_asked{asked}_{index:02d}.png"


def _asked_number(folder: Path, step: int) -> int:
    """How many sets were asked for at this step already."""
    return sum(1 for _ in folder.glob(f"{step:06d}_asked*_00.png"))


def _save_picture(path: Path, picture: Image.Image, facts: dict[str, Any]) -> None:
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(facts, ensure_ascii=False))
    aside = path.with_suffix(".tmp")
    picture.save(aside, format="PNG", pnginfo=info)
    aside.replace(path)
