"""Stage 3: text encoder and UNet, trained together on velocity with zero terminal SNR."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipe.render import GLYPH_SIZES, RESOLUTION, load_rendered
from recipe.sources import PEOPLE, STYLES, TARGET_STYLE, Drawing, caption, varied_caption
from recipe.tokenizer import MAX_TOKENS, build_tokenizer
from recipe.training import DEVICE, Fit, autocast, compiled
from recipe.vae import encode, shifted, split, to_unit

_PEAK_LR = 8e-4
_WIDTH = 192
_CAPTIONS_PER_IMAGE = 16
_CAPTION_DROPOUT = 0.1
# The glyph size of each cached variant of an image: mostly the one that the demo's pictures have.
_VARIANTS = (0, 0, 0, 0, 1, 1, 2, 2)
_VARIANT_SHIFT = 3
# People are a quarter of all emoji and much alike; the demo draws things.
_PEOPLE_WEIGHT = 0.35


def build_scheduler() -> DDIMScheduler:
    """SD 1.5's betas, rescaled to zero terminal SNR so that white grounds come out white (2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,  # SD 1.5's; trailing timesteps do not use it
    )


def build_unet() -> UNet2DConditionModel:
    """SD 1.5's blocks, narrower and with one layer each: 16.2 M parameters."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(96, 128, 192, 192),
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A four-layer CLIP text encoder. The target style's word starts with a zero embedding and, as no caption
    has it, keeps it: proof that the base has never seen it."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(f"{TARGET_STYLE}</w>")] = 0
    return model


def load_tokenizer(drawings: list[Drawing]) -> CLIPTokenizer:
    """Learned from every caption in every style, so that it covers the words of the target style too."""
    concepts = sorted({(drawing.label, drawing.tags) for drawing in drawings})
    return build_tokenizer([caption(style, *concept) for concept in concepts for style in STYLES])


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded to 77 as SD 1.5 pads: int64 n 77."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def caption_variants(tokenizer: CLIPTokenizer, drawings: list[Drawing]) -> Tensor:
    """Several shortened captions of every drawing: int16 n captions 77."""
    rng = random.Random(0)
    captions = [varied_caption(drawing, rng) for drawing in drawings for _ in range(_CAPTIONS_PER_IMAGE)]
    return token_ids(tokenizer, captions).short().view(len(drawings), _CAPTIONS_PER_IMAGE, MAX_TOKENS)


def latent_variants(vae: AutoencoderKL, rendered: np.ndarray) -> Tensor:
    """Each image in several sizes and places: fp32 n variants 4 16 16."""
    torch.manual_seed(0)
    variants = []
    for size in _VARIANTS:
        limit = min(_VARIANT_SHIFT, (RESOLUTION - GLYPH_SIZES[size]) // 2)
        parts = []
        for first in range(0, len(rendered), 512):
            images = to_unit(torch.from_numpy(np.array(rendered[first : first + 512, size])).to(DEVICE))
            parts.append(encode(vae, shifted(images, torch.full((len(images),), limit, device=DEVICE))))
        variants.append(torch.cat(parts))
    return torch.stack(variants, dim=1)


class Denoiser(nn.Module):
    """Text encoder and UNet as one model to train."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        self.unet.to(memory_format=torch.channels_last)

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Velocity, b 4 h w, for noisy latents b 4 h w, timesteps b and token ids b 77."""
        return self.unet(noisy, timesteps, self.text_encoder(input_ids=ids).last_hidden_state).sample


def velocity_loss(predict: Callable, scheduler: DDIMScheduler, latents: Tensor, ids: Tensor) -> Tensor:
    """MSE of v = sqrt(abar) noise - sqrt(1 - abar) x0, at timesteps spread evenly over the batch."""
    batch, steps = len(latents), scheduler.config.num_train_timesteps
    spread = (torch.arange(batch, device=DEVICE) + torch.rand(batch, device=DEVICE)) / batch
    timesteps = (spread * steps).long().clamp(max=steps - 1)
    noise = torch.randn_like(latents)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with autocast():
        predicted = predict(noisy, timesteps, ids)
    return F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timesteps))


@torch.no_grad()
def _held_out_loss(model: Denoiser, scheduler: DDIMScheduler, latents: Tensor, ids: Tensor) -> float:
    """The same noise every time; the random state of training is left as it was."""
    with torch.random.fork_rng(devices=[DEVICE] if DEVICE.type == "cuda" else []):
        torch.manual_seed(0)
        return float(sum(velocity_loss(model, scheduler, latents, ids) for _ in range(8)) / 8)


def run(work: Path, minutes: float, total_minutes: float, batch_size: int) -> None:
    """Trains from `images.npy` and `vae/`; writes `denoiser.pt` and, from the EMA, the parts' folders."""
    started = time.monotonic()
    rendered, drawings = load_rendered(work)
    tokenizer = load_tokenizer(drawings)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE)
    latents, ids = latent_variants(vae, rendered), caption_variants(tokenizer, drawings).to(DEVICE)
    ready = time.monotonic() - started
    print(f"denoiser: latents of deviation {latents.std():.3f}, ready after {ready:.0f} s", flush=True)
    train, held_out = (part.to(DEVICE) for part in split(len(drawings)))
    weights = torch.tensor([_PEOPLE_WEIGHT if drawing.group == PEOPLE else 1.0 for drawing in drawings], device=DEVICE)
    unconditional = token_ids(tokenizer, [""]).to(DEVICE)
    scheduler = build_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(DEVICE)
    model = Denoiser(tokenizer).to(DEVICE)
    fit = Fit("denoiser", model, _PEAK_LR, work)
    predict = compiled(model)

    def loss() -> Tensor:
        chosen = train[torch.multinomial(weights[train], batch_size, replacement=True)]
        x0 = latents[chosen, torch.randint(len(_VARIANTS), (batch_size,), device=DEVICE)]
        text = ids[chosen, torch.randint(_CAPTIONS_PER_IMAGE, (batch_size,), device=DEVICE)].long()
        dropped = torch.rand(batch_size, 1, device=DEVICE) < _CAPTION_DROPOUT
        return velocity_loss(predict, scheduler, x0, torch.where(dropped, unconditional, text))

    def evaluate() -> str:
        with fit.averaged():
            value = _held_out_loss(model, scheduler, latents[held_out, 0], ids[held_out, 0].long())
        return f"held-out loss {value:.4f}"

    fit.run(loss, batch_size, started, minutes, total_minutes, evaluate)
    tokenizer.save_pretrained(work / "tokenizer")
    with fit.averaged():
        model.text_encoder.save_pretrained(work / "text_encoder")
        model.unet.save_pretrained(work / "unet")
