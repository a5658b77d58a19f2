"""Stage 2: the autoencoder, 128 px to 16 x 16 x 4 latents, with latents of mean 0 and deviation 1."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from recipe.render import GLYPH_SIZES, RESOLUTION, load_rendered, load_set
from recipe.training import DEVICE, Fit, autocast, compiled

_PEAK_LR = 1e-3
_KL_WEIGHT = 5e-7
_HELD_OUT = 128


def build() -> AutoencoderKL:
    """An untrained autoencoder of 3.9 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=4,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        force_upcast=False,
    )


def split(count: int) -> tuple[Tensor, Tensor]:
    """Indices of the base drawings that are trained on, and of those that only measure."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = min(_HELD_OUT, count // 10)
    return order[held_out:], order[:held_out]


def to_unit(images: Tensor) -> Tensor:
    """uint8 b h w c -> float b c h w in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def shifted(images: Tensor, margins: Tensor) -> Tensor:
    """Each image moved by up to its margin (b) both ways: what wraps round the edge is white. b c h w."""
    batch, channels, height, width = images.shape
    place = torch.arange(height, device=images.device)
    offsets = ((2 * torch.rand(2, batch, device=images.device) - 1) * margins).round().long()
    rows = (place + offsets[0, :, None]) % height  # b h
    columns = (place + offsets[1, :, None]) % width
    images = images.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
    return images.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def _chance(batch: int, probability: float) -> Tensor:
    return (torch.rand(batch, device=DEVICE) < probability)[:, None, None, None]


def _outlined(images: Tensor) -> Tensor:
    """Every edge drawn over with one dark colour: the line art that the base styles do not have."""
    edge = F.max_pool2d(images, 3, 1, 1) + F.max_pool2d(-images, 3, 1, 1)
    ink = torch.rand(len(images), 3, 1, 1, device=images.device) * 0.4 - 1
    return torch.where(edge.amax(1, keepdim=True) > 0.35, ink, images)


def augmented(images: Tensor, chosen: Tensor) -> Tensor:
    """A batch in random sizes and places, some mirrored, recoloured or outlined: b c h w in [-1, 1]."""
    batch = len(chosen)
    size = torch.randint(len(GLYPH_SIZES), (batch,), device=DEVICE)
    margins = ((RESOLUTION - torch.tensor(GLYPH_SIZES, device=DEVICE)) // 2)[size]
    x = shifted(to_unit(images[chosen, size]), margins)
    x = torch.where(_chance(batch, 0.5), x.flip(3), x)
    channels = torch.rand(batch, 3, device=DEVICE).argsort(1)[:, :, None, None].expand_as(x)
    x = torch.where(_chance(batch, 0.3), x.gather(1, channels), x)
    return torch.where(_chance(batch, 0.1), _outlined(x), x)


def _high_pass(images: Tensor) -> Tensor:
    return images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def reconstruction_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """L1 + 4 MSE + L1 of the detail, which keeps edges sharp, + a little KL for smooth latents."""
    with autocast():
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        decoded = vae.decode(latents).sample
    difference = decoded.float() - images
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    pixels = difference.abs().mean() + 4 * difference.square().mean()
    return pixels + _high_pass(difference).abs().mean() + _KL_WEIGHT * kl


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 b h w c -> the decoded picture in [0, 1], b c h w."""
    parts = []
    for part in images.split(64):
        with autocast():
            decoded = vae.decode(vae.encode(to_unit(part.to(DEVICE))).latent_dist.mean).sample
        parts.append(decoded.float().add(1).div(2).clamp(0, 1))
    return torch.cat(parts)


def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over the images of 10 log10(1 / MSE), in dB."""
    truth = to_unit(images.to(DEVICE)).add(1).div(2)
    error = (reconstruct(vae, images) - truth).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return float(-10 * error.log10().mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """b c h w in [-1, 1] -> latents b 4 h/8 w/8, fp32."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)])


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Folds each latent channel's mean and deviation over `images` (uint8 b h w c) into the 1x1 convolutions.

    The decoded picture does not change, and `scaling_factor` is 1.
    """
    latents = encode(vae, to_unit(images.to(DEVICE)))
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, back = vae.quant_conv, vae.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()  # rows 4 to 7 are the log-variance


def run(work: Path, minutes: float, total_minutes: float, batch_size: int) -> None:
    """Trains from `images.npy`; writes the state `vae.pt` and the normalised EMA weights as folder `vae/`."""
    started = time.monotonic()
    rendered, _ = load_rendered(work)
    images = torch.from_numpy(np.array(rendered)).to(DEVICE)  # n sizes h w c
    train, held_out = (part.to(DEVICE) for part in split(len(images)))
    unseen_style = torch.from_numpy(load_set(work / "heldout"))
    vae = build().to(DEVICE, memory_format=torch.channels_last)
    fit = Fit("vae", vae, _PEAK_LR, work)
    compiled_loss = compiled(reconstruction_loss)

    def loss() -> Tensor:
        chosen = train[torch.randint(len(train), (batch_size,), device=DEVICE)]
        return compiled_loss(vae, augmented(images, chosen).contiguous(memory_format=torch.channels_last))

    def evaluate() -> str:
        raw = psnr(vae, images[held_out, 0])
        with fit.averaged():
            return (f"PSNR held-out {psnr(vae, images[held_out, 0]):.2f} dB (raw weights {raw:.2f}), "
                    f"unseen style {psnr(vae, unseen_style):.2f} dB")  # fmt: skip

    fit.run(loss, batch_size, started, minutes, total_minutes, evaluate)
    with fit.averaged():
        normalise_latents(vae, images[train[:2048], 0])
        print(f"vae: after normalisation {psnr(vae, images[held_out, 0]):.2f} dB", flush=True)
        vae.save_pretrained(work / "vae")
