"""The peer's step for the same work: diffusers' model with PEFT's LoRA in fp32, bf16 autocast, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.bench import true_size
from tests.bench.true_size import Size
from trainer import families
from trainer.fast import whole_gradient
from trainer.material import noise_seeds

LR = 1e-4


class Peer(NamedTuple):
    """What is measured of it."""

    step: Callable[[int], Tensor]  # number -> loss
    trained: int  # numbers
    predict: Callable[[], Tensor]  # a forward pass


def build(size: Size, denoiser: nn.Module, rank: int, checkpointing: bool, device: torch.device, dtype: torch.dtype,
          latents: Tensor, texts: dict[str, Tensor]) -> Peer:
    """The step as the usual training scripts take it, on the linears that our adapter has, with the noise of ours."""
    from peft import LoraConfig  # late: only these rows need it

    family = families.get(size.family)
    whole_gradient.install()  # without it cuDNN's attention, torch's first choice, ends Flux.1 with an illegal access
    targets = family.adapter_targets({family.DENOISER: denoiser}, true_size.BLOCK_LINEARS[size.family])
    chosen = {id(module) for target in targets for module in target.modules}
    names = [name for name, module in denoiser.named_modules() if id(module) in chosen]
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names))
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    denoiser.train()
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    objective = true_size.session.find_objective(true_size.preset_of(size, "lora", rank),
                                                 true_size.base_of(size)).to(device)
    latents = latents.to(device)
    conditioning = {name: value.to(device, dtype) for name, value in texts.items()}

    def draw(number: int) -> tuple[Tensor, Tensor]:
        seeds = noise_seeds(true_size.draws(size, number), 0)
        return objective.draw(seeds, latents.shape[1:], device, latents.dtype)

    def predict(noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = objective.add_noise(latents, noise, timesteps).to(dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return family.predict(denoiser, noisy, timesteps, conditioning)

    def step(number: int) -> Tensor:
        noise, timesteps = draw(number)
        prediction = predict(noise, timesteps)
        loss = torch.nn.functional.mse_loss(prediction.float(), objective.target(latents, noise, timesteps).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Peer(step, sum(parameter.numel() for parameter in parameters), lambda: predict(*draw(0)))
