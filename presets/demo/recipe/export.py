"""Stage 4: the finished base as a diffusers folder in fp16, the picture sets beside it, and sample grids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from recipe.denoiser import build_scheduler
from recipe.render import load_rendered, load_set
from recipe.sources import BASE_STYLES, STYLES, TARGET_STYLE
from recipe.tokenizer import save_tokenizer
from recipe.training import DEVICE
from recipe.vae import psnr, reconstruct, split

_SHARD = "15MB"
_PROMPTS = (
    "octopus, animal, creature, ocean", "fox, animal, face", "umbrella, rain", "violin, instrument, music",
    "red apple, fruit", "sailboat, boat, sea", "penguin, animal, bird", "guitar, instrument, music",
    "rocket, space", "hamburger, food", "house, building", "lion, animal, face",
)  # fmt: skip
_SAMPLE_STEPS, _GUIDANCE = 12, 4.0


def _grid(rows: list[np.ndarray]) -> Image.Image:
    """Rows of uint8 [n, h, w, 3] as one picture."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


@torch.no_grad()
def place_target_word(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Moves the embedding of the target style's word from zero to the mean of the base styles' words.

    A zero embedding is so far from any word that it drowns the rest of the prompt; in the middle of the known
    styles it gives a neutral start, which a LoRA then fills with a style. Raises ValueError when the word was
    trained on.
    """
    embedding = text_encoder.get_input_embeddings().weight
    target = tokenizer.convert_tokens_to_ids(f"{TARGET_STYLE}</w>")
    if embedding[target].any():
        raise ValueError(f"the base model has been trained on captions with the word {TARGET_STYLE!r}")
    known = sorted({style.words.split()[0] for style in BASE_STYLES.values()})
    embedding[target] = embedding[[tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in known]].mean(0)


def _save_base(work: Path, folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    place_target_word(pipeline.text_encoder, pipeline.tokenizer)
    for model in (pipeline.vae, pipeline.unet):
        model.register_to_config(_name_or_path="")  # else the folder of whoever built it is told to everyone
    pipeline.to(torch.float16).save_pretrained(folder, max_shard_size=_SHARD)
    save_tokenizer(pipeline.tokenizer, folder / "tokenizer")
    return pipeline


def _sample_grid(pipeline: StableDiffusionPipeline) -> Image.Image:
    """A row a style, the last one that the base has never seen; a column a prompt."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for style in STYLES.values():
        images = pipeline(
            [f"{style.words}, {prompt}" for prompt in _PROMPTS],
            num_inference_steps=_SAMPLE_STEPS,
            guidance_scale=_GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(_PROMPTS))],
            output_type="np",
        ).images
        rows.append((images * 255).round().astype(np.uint8))
    return _grid(rows)


def _reconstruction_grid(vae: AutoencoderKL, images: np.ndarray) -> Image.Image:
    """Every other row the truth, below it what the autoencoder makes of it."""
    decoded = reconstruct(vae, torch.from_numpy(images)).mul(255).round().byte()
    decoded = decoded.permute(0, 2, 3, 1).cpu().numpy()  # b h w c
    rows = []
    for first in range(0, len(images) - 11, 12):
        rows += [images[first : first + 12], decoded[first : first + 12]]
    return _grid(rows)


def _training_state(work: Path, name: str) -> dict[str, float]:
    state = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)
    return {"steps": state["step"], "minutes": round(state["elapsed"] / 60, 1)}


def run(work: Path, out: Path) -> None:
    """Writes `base/`, `concept/` and `heldout/` to `out`; `samples.png`, `reconstructions.png` to `work`."""
    for name in ("base", "concept", "heldout"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("concept", "heldout"):
        shutil.copytree(work / name, out / name)
    pipeline = _save_base(work, out / "base").to(DEVICE, torch.float32)
    rendered, drawings = load_rendered(work)
    held_out = np.ascontiguousarray(rendered[np.sort(split(len(drawings))[1].numpy()), 0])
    unseen_style = load_set(out / "heldout")
    quality = {
        "psnr_held_out": round(psnr(pipeline.vae, torch.from_numpy(held_out)), 2),
        "psnr_unseen_style": round(psnr(pipeline.vae, torch.from_numpy(unseen_style)), 2),
    }
    facts = {
        "styles": {name: sum(drawing.style == name for drawing in drawings) for name in BASE_STYLES},
        "style_words": [style.words for style in BASE_STYLES.values()],
        "vae": _training_state(work, "vae") | quality,
        "denoiser": _training_state(work, "denoiser"),
    }
    (out / "base" / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _reconstruction_grid(pipeline.vae, np.concatenate([held_out[:36], unseen_style[:24]])).save(
        work / "reconstructions.png"
    )
    _sample_grid(pipeline).save(work / "samples.png")
    size = sum(file.stat().st_size for file in (out / "base").rglob("*") if file.is_file())
    print(f"export: {size / 1e6:.1f} MB; {json.dumps(facts)}", flush=True)
