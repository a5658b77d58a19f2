"""Says what a training step will hold in memory before anything is loaded: the step runs on tensors without data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer import families
from trainer.adapters import METHODS, layer
from trainer.adapters.layout import Layout
from trainer.adapters.stella import STREAMS, StelLA
from trainer.adapters.target import Target
from trainer.memory.blocks import repeated_blocks
from trainer.memory.fetch import BUFFERS
from trainer.memory.offload import spread
from trainer.memory.plan import Plan
from trainer.memory.selective import checkpoint_blocks
from trainer.memory.trace import META, Alive, gpu_kernels
from trainer.memory.weights import bytes_of
from trainer.quantize.linear import QuantizedLinear
from trainer.quantize.model import linears_in_blocks, weight_bytes
from trainer.schema import Preset
from trainer.session import find_targets, models_by_name

STATE = {"adamw": 8, "adamw8bit": 2, "scaled_adamw": 8, "sgd": 4, "stiefel": 4}  # bytes a trained number, by optimizer
HELD = 4 + 4 + 2  # parameter, gradient, and in 16 bits the start, from which drift is measured
EMA = 4
AVERAGED = 4  # the gradients once more, as they travel between processes
RULE = {"stella": 4, "stiefel": 2}  # what the manifold's step keeps
UPDATE = {"polar": 6, "qr": 7, "exponential": 20}  # bytes a trained number that come and go in an optimizer step
UPDATE_FREE = 2  # without a manifold
WORKSPACE = 96 * 2**20  # what cuBLAS takes for its products, on two threads, measured on a Hopper; others need less
BESIDE = 32 * 2**20  # and on each stream of StelLA's backward pass, on a Hopper or where steps repeat to the bit
HOPPER = (9, 0)  # compute capability
CONVOLUTIONS = 256 * 2**20  # what cuDNN takes beside a UNet's convolutions: measured 0.24 GiB (SD 1.5), 0.34 (SDXL)


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training step."""

    weights: int  # of the frozen models, as they are held on the device
    adapter: int  # parameters, gradients, optimizer, averages
    step: int  # activations and whatever else comes and goes
    host: int  # weights of offloaded blocks

    @property
    def peak(self) -> int:
        """What tensors take on the device."""
        return self.weights + self.adapter + self.step


class UnmadeLinear(QuantizedLinear):
    """A quantised linear without data, that makes its W for each product as the true ones do."""

    @property
    def weight(self) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=META)


class Estimator:
    """Estimates for the plans of one preset; each kind of step is run once."""

    def __init__(self, preset: Preset, denoiser: nn.Module, dtype: torch.dtype, size: tuple[int, int] | None = None,
                 text_encoder: Any = None, device: torch.device = META, processes: int = 1) -> None:
        """denoiser, text_encoder (where it is trained): skeletons on the meta device, which stay as they are.  size:
        width and height in pixels of the largest pictures; left out, data.resolution's square.  device: that trains.
        processes: that train together."""
        self.preset, self.skeleton, self.dtype, self.text_encoder = preset, denoiser, dtype, text_encoder
        self.family = families.get(preset.model.family)
        self.size = size or (preset.data.resolution, preset.data.resolution)
        self.device, self.processes, self.steps = device, processes, dict[tuple[bool, str], tuple[int, int, int]]()

    def __call__(self, plan: Plan) -> Estimate:
        """What a step takes when the model is held as `plan` says."""
        kind = plan.quantize != "none", plan.checkpointing
        if kind not in self.steps:
            self.steps[kind] = self._trace(*kind)
        trained, activations, beside = self.steps[kind]
        weights, host = self._weights(plan)
        train, method = self.preset.train, self.preset.adapter.method
        rule = 0 if train.optimizer == "stiefel" else RULE.get(method, 0)
        held = (HELD + STATE[train.optimizer] + rule + (EMA if train.ema_decay else 0)
                + (AVERAGED if self.processes > 1 else 0))
        convolves = any(isinstance(module, nn.Conv2d) for module in self.skeleton.modules())
        hopper = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) == HOPPER
        workspace = WORKSPACE + beside * BESIDE * (hopper or train.deterministic) + (CONVOLUTIONS if convolves else 0)
        return Estimate(weights, trained * held, max(activations, self._update(trained)) + workspace, host)

    def fits(self, plan: Plan, room: float) -> bool:
        """Whether a step takes at most so many bytes; none is run where the weights alone take more."""
        return self._weights(plan)[0] <= room and self(plan).peak <= room

    def _weights(self, plan: Plan) -> tuple[int, int]:
        """Bytes of all frozen weights on the device, and on the host."""
        weights, host = held_weights(self.skeleton, plan, self.dtype)
        text = 0 if self.text_encoder is None else bytes_of(self.text_encoder, "none", self.dtype)
        return weights + text, host

    def _update(self, trained: int) -> int:
        """Bytes that come and go in an optimizer step, beside the slices of the last forward pass."""
        chosen = self.preset.adapter
        name = {"stella": "polar", "stiefel": "qr"}.get(chosen.method, "") if chosen.retraction == "default" else (
            chosen.retraction)
        return trained * (UPDATE.get(name, UPDATE_FREE) + self.dtype.itemsize)

    def _trace(self, quantised: bool, checkpointing: str) -> tuple[int, int, int]:
        """Numbers trained, bytes at the peak of forward and backward pass beside weights and adapter, `streams_of`."""
        denoiser = nn.Module.to(copy.deepcopy(self.skeleton), META, self.dtype).requires_grad_(False)
        for path, linear in linears_in_blocks(denoiser).items() if quantised else ():
            denoiser.set_submodule(path, UnmadeLinear(linear.weight.shape, linear.bias, self.dtype))
        checkpoint_blocks(self.family, denoiser, checkpointing)
        targets = find_targets(self.preset, models_by_name(self.family, denoiser, copy.deepcopy(self.text_encoder)))
        method, leaves = make_leaves(self.preset, Layout(tuple(targets), self.preset.adapter.rank))
        for target in targets:
            layer.install(target, self.preset.adapter.dropout)
        gradients = [leaf.grad for leaf in leaves.values()]
        with Alive([*denoiser.parameters(), *denoiser.buffers(), *leaves.values(), *gradients]) as alive, gpu_kernels():
            self._step(denoiser, targets, method, leaves)
        return sum(leaf.numel() for leaf in leaves.values()), alive.peak, streams_of(method)

    def _step(self, denoiser: nn.Module, targets: list[Target], method: Any, leaves: dict[str, Tensor]) -> None:
        """What `Session.loss` and `backward` do, without data."""
        batch, dtype = self.preset.train.batch_size, self.dtype
        cast = {key: stack.to(dtype) for key, stack in method.pair(leaves).items()}
        downs, ups = method.layout.by_layer(cast, "down"), method.layout.by_layer(cast, "up")
        for target, down, up in zip(targets, downs, ups):
            gain = torch.ones(target.inputs, device=META, dtype=dtype) if self.preset.adapter.dora else None
            layer.switch(target, down, up, gain)
        latents = torch.empty(batch, *self.family.latent_shape(*self.size), device=META)
        noise, timesteps = torch.empty_like(latents), torch.empty(batch, device=META)
        conditioning = {name: torch.empty(batch, *shape, dtype=dtype, device=META)
                        for name, shape in self.family.prompt_shapes(denoiser.config).items()}
        prediction = self.family.predict(denoiser, (latents + noise).to(dtype), timesteps, conditioning).float()
        (prediction - (noise - latents)).square().mean().backward()


def make_leaves(preset: Preset, layout: Layout) -> tuple[Any, dict[str, Tensor]]:
    """The method of a preset, and its leaves without data."""
    kind = METHODS[preset.adapter.method]
    method = kind(layout, preset.adapter.diagonal) if issubclass(kind, StelLA) else kind(layout)
    leaves = {key: torch.empty(shape, device=META).requires_grad_() for key, shape in method.shapes().items()}
    for leaf in leaves.values():
        leaf.grad = torch.empty_like(leaf)
    return method, leaves


def streams_of(method: Any) -> int:
    """On how many streams of its own the backward pass works on an adapter's sizes."""
    return min(STREAMS, len(method.dims)) if isinstance(method, StelLA) else 0


def held_weights(denoiser: nn.Module, plan: Plan, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a denoiser's weights on the device, and of those on the host.

    Layers that multiply in 8 bits take as much: codes in both orders what 16 bits took, stored ones what they took.
    """
    linears = linears_in_blocks(denoiser).values() if plan.quantize != "none" else ()
    small = {id(linear.weight): weight_bytes((linear.out_features, linear.in_features), plan.quantize)
             for linear in linears}

    def size(module: nn.Module) -> int:
        return sum(small.get(id(weight), weight.numel() * dtype.itemsize) for weight in module.parameters())

    blocks = repeated_blocks(denoiser)
    if plan.shards > 1:
        sizes = [size(block) for block in blocks]
        return size(denoiser) - sum(sizes) + sum(sizes) // plan.shards + max(sizes) * min(BUFFERS, len(sizes)), 0
    away = [size(blocks[number]) for number in spread(len(blocks), plan.offload_blocks)]
    return size(denoiser) - sum(away) + max(away, default=0) * min(BUFFERS, len(away)), sum(away)
