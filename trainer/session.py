"""Everything that a running trainer holds: what a step needs, and how each part of it is made from a preset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer import adapters, families, gpu, optim
from trainer.adapters import Adapter
from trainer.adapters.stella import rank_budget
from trainer.adapters.target import Target, matching
from trainer.checkpoint import Progress
from trainer.data.cache import Cache
from trainer.data.mask_store import MaskStore
from trainer.data.order import Draw, Order, share
from trainer.data.store import LatentStore, TextStore
from trainer.distributed import ALONE, World
from trainer.errors import UserError
from trainer.families.base import quantised_id
from trainer.fast import gpu_layers
from trainer.fast.graphs import StepGraphs
from trainer.fast.matmul import LowBits
from trainer.fast.prefetch import Prefetcher
from trainer.faults import out_of_memory
from trainer.flow import FlowObjective
from trainer.material import Material, framing, noise_seeds, to_device
from trainer.memory import selective
from trainer.memory.blocks import repeated_blocks
from trainer.memory.offload import Offload
from trainer.memory.plan import Plan
from trainer.memory.shards import Neighbours, Shards, load_shared
from trainer.objective import Objective, per_sample_loss, pixel_weights
from trainer.record import Recorder, with_rate
from trainer.run import Run
from trainer.runner import chosen_gpus
from trainer.schema import FAMILY_MODEL, FLOW_FAMILIES, Preset

if TYPE_CHECKING:
    from trainer.averaging import Averager

ENCODE_BATCH = 8  # images or prompts encoded at a time while caching
LATENT_DTYPE = torch.float32  # noise is added to them at full precision
TEXT = "text."  # before the names of embeddings among a micro-batch's tensors
FP16_LOSS_SCALE = 1024.0  # fixed: a step that overflows is skipped on the device, and no search needs saving
Guard = Callable[[], None]  # called now and then in long work; raises when the run was asked to stop


class Model(NamedTuple):
    """What is trained, over what it changes; parts of a `Session` by the same names."""

    denoiser: nn.Module
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    offload: Offload | Shards | None
    plan: Plan


@dataclass
class Session:
    """A run in memory.  `texts` is None when a text encoder is trained: then prompts are encoded afresh each time."""

    run: Run
    preset: Preset
    recorder: Recorder
    guard: Guard
    device: torch.device
    dtype: torch.dtype
    family: ModuleType
    base: Any
    cache: Cache
    material: Material
    captions: list[list[str]]
    latents: LatentStore
    held_latents: LatentStore
    masks: MaskStore
    held_masks: MaskStore
    texts: TextStore | None
    text_encoder: Any
    objective: Objective | FlowObjective
    denoiser: nn.Module
    adapter: Adapter
    optimizer: torch.optim.Optimizer  # its state is a flat dict of tensors, restored in place
    schedule: Callable[[int], float]
    order: Order
    steps: int
    progress: Progress
    whole: bool = True  # False inside an optimizer step
    spectra: tuple[int, Future[dict[str, Any]]] | None = None  # ranks being computed, and of which step
    plan: Plan = Plan()  # how the denoiser is held
    offload: Offload | Shards | None = None  # where blocks come from that are not held whole
    text_quantize: str = "none"  # how the text encoder was held when it filled the cache
    low_bits: LowBits | None = None  # how the denoiser's layers multiply, if in 8 bits
    limit: int = 0  # bytes of GPU memory that tensors may take; 0: nobody measured
    prefetch: Prefetcher | None = None  # reads micro-batches ahead while the run trains
    graphs: StepGraphs | None = None  # runs a micro-batch's passes as CUDA graphs
    attention: AbstractContextManager[None] | None = None  # in which attention prefers chosen kernels
    world: World = ALONE  # the processes that train this run
    averager: Averager | None = None  # of their gradients, where there are several
    neighbours: Neighbours | None = None  # those that can hold the model together
    latest: Tensor = field(init=False)  # 2 b: each sample's plain loss and timestep, of the last micro-batch
    seen: Tensor = field(init=False)  # n 2 b: the same of all micro-batches of a step

    def __post_init__(self) -> None:
        train = self.preset.train
        self.latest = torch.zeros(2, train.batch_size, device=self.device)  # written in place, so a graph can do it
        self.seen = torch.zeros(train.grad_accum, 2, train.batch_size, device=self.device)

    def loss(self, draws: Sequence[Draw]) -> Tensor:
        """Mean training loss of one micro-batch; a function of the draws alone, and of the adapter."""
        return self.loss_of(self.inputs(draws), self.prompts(draws))

    def read(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """What the caches keep of a micro-batch, on the host; another thread may ask for it."""
        batch = {"latents": self.latents.latents(draws, "cpu"), "framing": framing(self.latents, draws)}
        if (masks := self.masks.masks(draws, "cpu")) is not None:
            batch["mask"] = masks
        if weights := self.material.loss_weights(self.latents, draws):
            batch["weight"] = torch.tensor(weights)
        if self.texts is not None:
            batch |= {TEXT + name: value for name, value in self.texts.embeds(self.prompts(draws)).items()}
        return batch

    def inputs(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Everything on the device that a micro-batch's loss is computed from, drawn noise and timesteps with it."""
        batch = self.prefetch.take(draws) if self.prefetch else self.read(draws)
        texts = {name: batch.pop(name) for name in list(batch) if name.startswith(TEXT)}
        batch = to_device(batch, self.device, LATENT_DTYPE) | to_device(texts, self.device, self.dtype)
        train, latents = self.preset.train, batch["latents"]  # b c h w
        noise, timesteps = self.objective.draw(noise_seeds(draws, train.seed), latents.shape[1:], self.device,
                                               latents.dtype, offset_noise=train.offset_noise)
        return batch | {"noise": noise, "timesteps": timesteps}

    def loss_of(self, inputs: dict[str, Tensor], prompts: Sequence[str] = ()) -> Tensor:
        """The loss of a micro-batch's `inputs`, computed on the device alone; `prompts` are for a text encoder that is
        trained, which encodes them afresh."""
        train, latents, noise, timesteps = self.preset.train, inputs["latents"], inputs["noise"], inputs["timesteps"]
        conditioning = {name.removeprefix(TEXT): value for name, value in inputs.items() if name.startswith(TEXT)}
        if self.texts is None:
            conditioning = self.conditioning(prompts)
        prediction = self.predict(latents, noise, timesteps, conditioning | {"framing": inputs["framing"]})
        target = self.objective.target(latents, noise, timesteps)
        weights = pixel_weights(inputs["mask"], self.preset.data.mask_background) if "mask" in inputs else None
        loss = per_sample_loss(prediction, target, kind=train.loss, delta=train.huber_delta, weights=weights)  # b
        self.latest[0, :len(loss)].copy_(loss.detach())
        self.latest[1, :len(loss)].copy_(timesteps)
        loss = loss * inputs["weight"] if "weight" in inputs else loss
        return (loss * self.objective.loss_weight(timesteps, train.snr_gamma)).mean()

    def prompts(self, draws: Sequence[Draw]) -> list[str]:
        """The captions of samples; a dropped one is the empty prompt."""
        return ["" if draw.caption < 0 else self.captions[draw.item][draw.caption] for draw in draws]

    def gradients(self, draws: Sequence[Draw], rounds: int | None = None, coming: Sequence[Draw] = ()) -> Tensor:
        """Add up the gradients of this process's part of a global batch, by micro-batches (only of the first `rounds`);
        returns their mean loss.

        Micro-batches are of equal size, so their means can be averaged. coming: the next step's draws, which can be
        read meanwhile.
        """
        count, loss = self.preset.train.grad_accum, torch.zeros((), device=self.device)
        rank, size = self.world.rank, self.world.size
        parts = [share(draws, rank, size, number, count)
                 for number in range(count if rounds is None else min(rounds, count))]
        after = [share(coming, rank, size, number, count) for number in range(count)] if coming else []
        for number, part in enumerate(parts):
            inputs = self.inputs(part)
            if self.prefetch:
                self.prefetch.send_for((parts + after)[number + 1:])
            if self.graphs:
                loss += self.graphs(inputs)
            else:
                micro = self.forward(inputs, self.prompts(part))
                self.backward(micro)
                loss += micro.detach()
            self.seen[number].copy_(self.latest)  # after the micro-batch, for a graph of one does not know its number
        return loss

    def forward(self, inputs: dict[str, Tensor], prompts: Sequence[str] = ()) -> Tensor:
        """A micro-batch's part of the loss, with the adapter's present weights."""
        self.use("raw")
        return self.loss_of(inputs, prompts) / self.preset.train.grad_accum

    def pixel_weights(self, masks: MaskStore, draws: Sequence[Draw]) -> Tensor | None:
        """Weights of the loss at each place, b 1 h w; None when no image of the batch has a mask."""
        covered = masks.masks(draws, self.device)
        return None if covered is None else pixel_weights(covered, self.preset.data.mask_background)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch, added to the bank's; fp16 activations' are scaled out of the underflow."""
        scale = FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        if scale == 1.0:
            loss.backward()
            return
        parameters = self.adapter.parameters()
        fresh = torch.autograd.grad(loss * scale, parameters)
        torch._foreach_add_([leaf.grad for leaf in parameters], list(fresh), alpha=1.0 / scale)

    def predict(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The denoiser's answer in fp32 for noised latents."""
        noisy = self.objective.add_noise(latents, noise, timesteps).to(self.dtype)
        return self.family.predict(self.denoiser, noisy, timesteps, conditioning).float()

    def conditioning(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of prompts on the device, from the cache where there is one."""
        if self.texts is None:
            return to_device(self.family.encode_prompts(self.text_encoder, list(texts)), self.device, self.dtype)
        return to_device(self.texts.embeds(list(texts)), self.device, self.dtype)

    def use(self, weights: str) -> None:
        """Let the model run with the adapter's "raw" or "ema" weights, or without it ("off")."""
        self.adapter.refresh(weights, self.dtype)

    def shrink(self) -> None:
        """Cut singular values down to the rank that the step just made leaves, if the preset wants a lower one."""
        chosen = self.preset.adapter
        if chosen.rank_target:
            self.adapter.prune(rank_budget(self.progress.step, self.steps, chosen.rank, chosen.rank_target))

    @property
    def gpus(self) -> int:
        """How many GPUs can hold the model together."""
        return len(self.neighbours.ranks) if self.neighbours else 1

    @property
    def shown_weights(self) -> str:
        """The weights that exports, samples and validation use."""
        chosen = self.preset.output.weights
        return chosen if chosen != "auto" else ("ema" if self.preset.train.ema_decay > 0 else "raw")

    def encode_new(self, texts: Sequence[str]) -> None:
        """Cache prompts that came during the run; the text encoder is loaded for them alone.

        Where it does not fit beside the model, it works in the host's memory: slower, and for a few prompts only.
        """
        if self.texts is None or not self.world.first:  # the first process encodes them for all: they are few
            return
        new = TextStore(texts, self.cache, quantised_id(self.base.text_id, self.text_quantize), self.dtype)
        try:
            fill_texts(new, self.family, self.base, self.device, self.text_quantize, self.recorder, self.guard)
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
        gpu.free_memory()
        fill_texts(new, self.family, self.base, torch.device("cpu"), "none", self.recorder, self.guard)


def load_model(preset: Preset, family: ModuleType, base: Any, text_encoder: Any, device: torch.device,
               dtype: torch.dtype, plan: Plan, neighbours: Neighbours | None = None) -> Model:
    """The denoiser, held as `plan` says, with a new adapter and its optimizer."""
    denoiser, shards = load(family, base, device, dtype, plan, neighbours)
    adapter = build_adapter(preset, family, denoiser, text_encoder, device)
    try:
        offload = hold(family, denoiser, plan, device)
        return Model(denoiser, adapter, build_optimizer(preset, adapter), offload or shards, plan)
    except Exception:
        adapter.remove()  # a text encoder that is trained stays, for another try
        raise


def load(family: ModuleType, base: Any, device: torch.device, dtype: torch.dtype, plan: Plan,
         neighbours: Neighbours | None) -> tuple[nn.Module, Shards | None]:
    """The denoiser with its weights, and where they are when GPUs share them."""
    if plan.shards > 1 and neighbours is not None:
        return load_shared(family, base, device, dtype, plan, neighbours)
    return load_denoiser(family, base, device, dtype, plan), None


def load_denoiser(family: ModuleType, base: Any, device: torch.device, dtype: torch.dtype, plan: Plan) -> nn.Module:
    """The denoiser on the device; in the host's memory if it is to be offloaded and does not fit as a whole."""
    try:
        return family.load_denoiser(base, device, dtype, plan.quantize)
    except Exception as error:
        if not plan.offload_blocks or not out_of_memory(error):
            raise
    gpu.free_memory()
    return family.load_denoiser(base, torch.device("cpu"), dtype, plan.quantize)


def hold(family: ModuleType, denoiser: nn.Module, plan: Plan, device: torch.device) -> Offload | None:
    """Checkpoint and offload a loaded denoiser's blocks as `plan` says; what is not offloaded comes to the device. On a
    GPU its layers become the fast ones, and so does attention in the whole process (`gpu_layers.install`)."""
    gpu_layers.install(denoiser, device)
    selective.checkpoint_blocks(family, denoiser, plan.checkpointing)
    if not plan.offload_blocks:
        return None
    offload = Offload(repeated_blocks(denoiser), plan.offload_blocks, device)
    away = {id(piece.tensor) for block in offload.blocks for piece in block.pieces}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
    return offload


def models_by_name(family: ModuleType, denoiser: nn.Module, text_encoder: Any) -> dict[str, nn.Module]:
    """What an adapter may sit on, by the names that its layers' names begin with."""
    return {family.DENOISER: denoiser} | ({} if text_encoder is None else {"text_encoder": text_encoder})


def find_targets(preset: Preset, models: dict[str, nn.Module]) -> list[Target]:
    """The layers that a preset chooses."""
    family, chosen = families.get(preset.model.family), preset.adapter
    fuse = {"fuse": chosen.fuse_qkv} if preset.model.family in FLOW_FAMILIES else {}
    return matching(family.adapter_targets(models, chosen.targets, **fuse), chosen.target_pattern)


def find_objective(preset: Preset, base: Any) -> Objective | FlowObjective:
    """What the base was trained to predict, at the timesteps that the preset chooses."""
    objective, train = families.get(preset.model.family).objective(base), preset.train
    if isinstance(objective, FlowObjective):
        return objective.with_sampling(train.timestep_sampling, train.timestep_mean, train.timestep_scale,
                                       train.timestep_shift)
    return objective


def build_adapter(preset: Preset, family: ModuleType, denoiser: nn.Module, text_encoder: Any,
                  device: torch.device) -> Adapter:
    """The adapter of a preset on its models, installed."""
    chosen = preset.adapter
    targets = find_targets(preset, models_by_name(family, denoiser, text_encoder))
    adapter = adapters.build(targets, method=chosen.method, rank=chosen.rank, init=chosen.init, dora=chosen.dora,
                             retraction=chosen.retraction, dropout=chosen.dropout, seed=preset.train.seed,
                             device=device, ema_decay=preset.train.ema_decay or None, diagonal_s=chosen.diagonal,
                             scale_dim=(chosen.scale_dim or None) if chosen.gradient_scaling else 0.0)
    adapter.install()
    return adapter


def build_optimizer(preset: Preset, adapter: Adapter) -> torch.optim.Optimizer:
    """The optimizer of a preset over its adapter."""
    train = preset.train
    return optim.build_optimizer(train.optimizer, adapter, lr=train.lr, weight_decay=train.weight_decay,
                                 betas=(train.beta1, train.beta2), momentum=train.momentum, cautious=train.cautious,
                                 gradient_weight=train.gradient_weight or None, up_lr_ratio=train.up_lr_ratio)


def open_base(preset: Preset) -> Any:
    """The preset's base model, checked but not loaded."""
    model = preset.model
    return families.get(model.family).open_base(
        model.base, **{key: getattr(model, key) for key in FAMILY_MODEL[model.family]})


def pick_device(preset: Preset, world: World = ALONE) -> torch.device:
    """The device of `memory.device`, and each of several processes' own; `UserError` when it is not there."""
    numbers = chosen_gpus(preset.memory.device)
    name = f"cuda:{numbers[0]}" if len(numbers) == 1 else preset.memory.device  # one may be named twice
    if len(numbers) > max(1, world.local_rank):  # those that this process sees may be these alone, numbered anew
        only_these = torch.cuda.device_count() <= len(numbers)  # fewer: --gpus chose them instead
        name = f"cuda:{world.local_rank if only_these else numbers[world.local_rank]}"
    elif world.size > 1 and name not in ("auto", "cpu"):
        count = "one device" if len(numbers) < 2 else f"{len(numbers)} devices"
        raise UserError(f"memory.device = {name!r} names {count}, and this run has {world.size} processes; choose "
                        "'auto', and the GPUs where the run is started")
    if world.size > 1 and name == "auto" and torch.cuda.is_available():
        name = f"cuda:{world.local_rank}"
    return gpu.pick_device(name, "memory.device")


def pick_dtype(preset: Preset, device: torch.device) -> torch.dtype:
    """The arithmetic of the frozen model."""
    return gpu.pick_dtype(preset.train.precision, device)


@contextmanager
def loaded(load: Callable[..., Any], base: Any, device: torch.device, dtype: torch.dtype = torch.float32,
           *quantize: str) -> Iterator[Any]:
    """A part of the base on the device, for as long as it is needed; its memory is given back after."""
    held = [load(base, device, dtype, *quantize)]
    try:
        yield held[0]
    finally:
        held.clear()
        gpu.free_memory()


def fill_texts(texts: TextStore, family: ModuleType, base: Any, device: torch.device, quantize: str,
               recorder: Recorder, guard: Guard, world: World = ALONE) -> None:
    """Encode the prompts that the cache lacks, each process its part; the text encoder is in memory only meanwhile."""
    if not any(world.together(lambda: bool(texts.missing()))):
        return
    recorder.phase("loading the text encoder")
    with loaded(family.load_text_encoder, base, device, family.TEXT_DTYPE, quantize) as encoder:

        def encode(prompts: list[str]) -> dict[str, Tensor]:
            guard()
            with torch.no_grad():
                return family.encode_prompts(encoder, prompts)

        texts.fill(encode, ENCODE_BATCH, with_rate(recorder, "caching captions", "captions"),
                   should_stop=lambda: False,  # `encode` looks for a stop itself
                   length=lambda text: family.prompt_chunks(encoder, text), world=world)
