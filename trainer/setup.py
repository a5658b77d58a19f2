"""Puts a run together in the order that memory asks for: text, VAE, denoiser; then takes its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, evaluation, families, gpu, optim
from trainer.adapters import Adapter
from trainer.adapters.target import part_rows
from trainer.checkpoint import Progress
from trainer.data.cache import Cache
from trainer.data.mask_store import MaskStore
from trainer.data.store import LatentStore, TextStore
from trainer.distributed import ALONE, World
from trainer.errors import UserError, naming
from trainer.export import reader
from trainer.export.stacked import together
from trainer.families.base import quantised_id
from trainer.faults import out_of_memory
from trainer.material import Material
from trainer.memory.choice import choose
from trainer.memory.meter import Meter
from trainer.memory.plan import FULL, WORDS, Plan, text_rungs
from trainer.memory.shards import Neighbours, meet
from trainer.memory.weights import bytes_of
from trainer.metrics.features import find_weights
from trainer.quantize.available import check_settings, works
from trainer.record import Recorder, with_rate
from trainer.run import Run
from trainer.schema import Preset
from trainer.session import (
    ENCODE_BATCH,
    LATENT_DTYPE,
    Guard,
    Session,
    fill_texts,
    find_objective,
    load_model,
    loaded,
    open_base,
    pick_dtype,
)


def set_up(run: Run, preset: Preset, device: torch.device, workspace: Path, recorder: Recorder, guard: Guard,
           meter: Meter | None = None, world: World = ALONE) -> Session:
    """Load, cache and build everything, resuming from the run's last checkpoint if there is one.

    With a `meter`, which knows the GPU's memory, the model is held in the fastest way that fits.  Several processes
    (`world`) share the encoding, and hold their models alike.
    """
    preset = share_batch(preset, checkpoint.last_progress(run), world, recorder)
    family, dtype = families.get(preset.model.family), pick_dtype(preset, device)
    gpu.choose_arithmetic(preset.train.precision, preset.train.deterministic)
    recorder.phase("opening the base model")
    base = open_base(preset)
    for note in base.notes:
        recorder.note(0, note)
    find_weights(preset.evaluate.distance, preset.evaluate.inception_weights)  # now, not after hours of training
    check_settings(preset.memory.quantize, preset.memory.quantize_text_encoder, device)
    cache = Cache(workspace / "cache")
    cache.remove_remains()
    material = Material(preset, family.bucket_step(preset.data.resolution), lambda done, of: (
        guard(), recorder.phase("reading images", done, of)))
    saved = _held_before(run)
    modes = _text_modes(preset, family, base, device, saved, meter, partial(_text_store, material, cache, base, dtype))
    texts, text_encoder, quantize = _prepare_text(preset, family, base, material, cache, device, dtype, recorder, guard,
                                                  min(world.together(lambda: modes), key=len), world)
    latents, held = prepare_latents(family, base, material, cache, device, recorder, guard, world)
    masks, held_masks = MaskStore(latents), MaskStore(held)
    for store in (masks, held_masks):
        world.from_first(lambda store=store: store.fill(
            lambda done, of: recorder.phase("caching masks", done, of), guard))
    for remark in material.remarks:
        recorder.note(run.last_step(), remark)
    for skipped in material.skipped:
        recorder.event("skipped", file=str(skipped.file), reason=skipped.reason)
        recorder.say(f"skipped {skipped.file}: {skipped.reason}")
    recorder.event("data", images=len(material.train), held_out=len(material.held), sha256=material.fingerprint())
    order = material.order(latents, preset.train.batch_size * preset.train.grad_accum * world.size)
    steps = preset.train.steps or (preset.train.epochs or 0) * order.steps_per_epoch
    _check_length(run, preset, steps)
    around = partial(
        Session, run=run, preset=preset, recorder=recorder, guard=guard, device=device, dtype=dtype, family=family,
        base=base, cache=cache, material=material, captions=[material.train_captions(item) for item in latents.items],
        latents=latents, held_latents=held, masks=masks, held_masks=held_masks, texts=texts, text_encoder=text_encoder,
        objective=find_objective(preset, base).to(device), order=order, steps=steps, progress=Progress(),
        schedule=optim.build_schedule(preset.train.lr_scheduler, steps, preset.train.warmup_steps),
        text_quantize=quantize, limit=meter.limit if meter else 0, world=world)

    neighbours = _neighbours(preset, world, device, recorder, run.last_step())

    def build(plan: Plan) -> Session:
        recorder.phase("loading the denoiser")
        guard()
        model = load_model(preset, family, base, text_encoder, device, dtype, plan, neighbours)
        return around(**model._asdict(), neighbours=neighbours)

    session = choose(build, preset, base, device, saved, meter, recorder, workspace, world, neighbours)
    if preset.adapter.start_from and run.last_step() == 0:
        _continue(session)
    _resume(session)
    return session


def share_batch(preset: Preset, saved: Progress | None, world: World, recorder: Recorder) -> Preset:
    """A preset whose train.grad_accum keeps the global batch of a run that goes on with another number of processes.

    Raises `UserError` where they cannot share it evenly.
    """
    train = preset.train
    each = train.batch_size * world.size
    if saved is None or not saved.global_batch or saved.global_batch == each * train.grad_accum:
        return preset
    rounds, rest = divmod(saved.global_batch, each)
    if rest:
        fitting = [str(size) for size in range(1, saved.global_batch + 1)
                   if saved.global_batch % (train.batch_size * size) == 0]
        raise UserError(f"this run trains with {saved.global_batch} images a step (train.batch_size = "
                        f"{train.batch_size}), which {_processes(world.size)} cannot share evenly; resume it on "
                        f"{' or '.join(fitting)}")
    recorder.note(saved.step, f"{_processes(world.size)} from here on, with train.grad_accum = {rounds}, so that a "
                  f"step still has {saved.global_batch} images")
    return preset.model_copy(update={"train": train.model_copy(update={"grad_accum": rounds})})


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def _neighbours(preset: Preset, world: World, device: torch.device, recorder: Recorder,
                step: int) -> Neighbours | None:
    """The processes that can hold the model together, as far as the preset lets them; None: each holds it whole."""
    chosen = preset.memory.shard
    if world.size == 1 or chosen == "off" or (chosen == "auto" and device.type != "cuda"):
        if world.size == 1 and chosen == "on":
            recorder.note(step, "memory.shard = 'on' has nothing to do here: one process trains this run")
        return None
    try:
        return meet(world, device)
    except UserError as error:
        if chosen == "on":
            raise UserError(f"memory.shard = 'on' does not work here: {error}. Set it to 'auto' or 'off'") from error
        recorder.note(step, f"Each GPU holds the whole model, since sharing it does not work here: {error}")
        return None


def _held_before(run: Run) -> Progress | None:
    """The last checkpoint's progress, which says how the model was held; None where that is to be chosen anew."""
    saved = checkpoint.last_progress(run)
    return None if saved is not None and "plan" in saved.fresh else saved


def _check_length(run: Run, preset: Preset, steps: int) -> None:
    """Refuse a number of steps that a warm-up fills, or a branch has behind it, when it follows from epochs."""
    check_warm_up(preset, steps)
    if (origin := run.origin()) and steps <= origin.step:
        raise UserError(f"train.epochs = {preset.train.epochs}: that is {steps} steps, and the branch begins at step "
                        f"{origin.step}; give more epochs")


def check_warm_up(preset: Preset, steps: int) -> None:
    """The same as the preset's own rule, for steps that follow from epochs."""
    if preset.train.warmup_steps >= steps:
        raise UserError(f"train.warmup_steps = {preset.train.warmup_steps}: the whole training has {steps} steps, so "
                        "the learning rate would never be reached; make it smaller")


def _text_store(material: Material, cache: Cache, base: Any, dtype: torch.dtype, mode: str) -> TextStore:
    """All texts of a run, as a text encoder that is held in this way encodes them."""
    return TextStore(material.prompts(), cache, quantised_id(base.text_id, mode), dtype)


def _text_modes(preset: Preset, family: ModuleType, base: Any, device: torch.device, saved: Progress | None,
                meter: Meter | None, store: Callable[[str], TextStore]) -> list[str]:
    """How the text encoder may be held, from what is likely to fit; a resumed run's own way comes first.

    Where the cache has all texts of one way, it is that: nothing of a text encoder has to be loaded then.
    """
    modes = text_rungs(preset.memory)
    if saved is not None:
        modes = modes[modes.index(saved.text_quantize):] if saved.text_quantize in modes else [saved.text_quantize]
    if len(modes) == 1 or "text_encoder" in preset.adapter.targets or (saved is None and meter is None):
        return modes[:1]
    for mode in modes if saved is None else modes[:1]:
        if not store(mode).missing():
            return [mode]
    modes = [mode for mode in modes if works(mode, device) or mode == modes[0]]
    if saved is not None:
        return modes
    skeleton = family.load_text_encoder(base, torch.device("meta"), family.TEXT_DTYPE)
    fitting = [number for number, mode in enumerate(modes)
               if bytes_of(skeleton, mode, family.TEXT_DTYPE) <= FULL * meter.limit]
    return modes[fitting[0] if fitting else -1:]


def _prepare_text(preset: Preset, family: ModuleType, base: Any, material: Material, cache: Cache, device: torch.device,
                  dtype: torch.dtype, recorder: Recorder, guard: Guard,
                  modes: Sequence[str], world: World) -> tuple[TextStore | None, Any, str]:
    """The cached embeddings, or the encoder that is trained; and how the encoder was held."""
    if "text_encoder" in preset.adapter.targets:
        return None, family.load_text_encoder(base, device, dtype), "none"
    for mode in modes:
        texts = _text_store(material, cache, base, dtype, mode)
        try:
            world.together(lambda mode=mode, texts=texts: fill_texts(texts, family, base, device, mode, recorder,
                                                                     guard, world))
        except Exception as error:
            if not out_of_memory(error) or mode == modes[-1]:
                raise
        else:
            if mode not in ("none", preset.memory.quantize_text_encoder):
                recorder.note(0, f"Memory: the text encoder is held in {WORDS[mode]} while it encodes the captions")
            return texts, None, mode
        gpu.free_memory()
    raise AssertionError("a list of modes is never empty")


def prepare_latents(family: ModuleType, base: Any, material: Material, cache: Cache, device: torch.device,
                    recorder: Recorder, guard: Guard, world: World = ALONE) -> tuple[LatentStore, LatentStore]:
    """The latents of the images to train on and of those held out; what the cache lacks is encoded now."""
    stores = (material.latent_store(material.trained, cache, base.vae_id, LATENT_DTYPE, training=True),
              material.latent_store(material.held, cache, base.vae_id, LATENT_DTYPE, training=False))
    if any(world.together(lambda: any(store.missing() for store in stores))):
        known = len(material.skipped)
        recorder.phase("loading the VAE")
        with loaded(family.load_vae, base, device) as vae:

            def encode(pixels: Tensor) -> Tensor:
                guard()
                with torch.no_grad():
                    return family.encode_images(vae, pixels)

            for store, name in zip(stores, ("caching latents", "caching held-out latents")):
                store.fill(encode, ENCODE_BATCH, with_rate(recorder, name, "images"),
                           should_stop=lambda: False, on_skip=material.skip, world=world, device=device)
        found = world.together(lambda: material.skipped[known:])
        material.skipped[known:] = [skipped for part in found for skipped in part]
    return stores


def _continue(session: Session) -> None:
    """Begin where another LoRA file ends."""
    chosen, adapter = session.preset.adapter, session.adapter
    pairs = together(reader.read(Path(chosen.start_from), family=session.preset.model.family),
                     part_rows(adapter.layout.targets))
    with naming(f"adapter.start_from: {chosen.start_from}"):
        adapter.load_pairs(pairs)
    session.recorder.note(0, f"continues {chosen.start_from}: {_start(pairs, adapter)}")


def _start(pairs: reader.Pairs, adapter: Adapter) -> str:
    """What is taken over from another LoRA file, in words."""
    rank, own = max(down.shape[0] for _, down, _ in pairs.values()), adapter.layout.rank
    change = "" if rank == own else f", filled up to {own}" if rank < own else f", cut to {own} by the SVD"
    return f"{len(pairs)} of {len(adapter.layout.targets)} layers, rank {rank}{change}"


def _take_over(session: Session, adapter: dict[str, Tensor], optimizer: dict[str, Tensor],
               fresh: Sequence[str]) -> None:
    """A checkpoint's state; of a branch, without the parts that begin anew."""
    step = session.run.last_step()
    if "average" in fresh:
        own = {key: value for key, value in session.adapter.state_dict().items() if key.startswith("ema.")}
        adapter = {key: value for key, value in adapter.items() if not key.startswith("ema.")} | own
    session.adapter.load_state_dict(adapter)
    if "average" in fresh:
        session.adapter.restart_average()
        session.recorder.note(step, "the running average begins here" if own else "the running average ends here")
    if "optimizer" in fresh:
        session.recorder.note(step, f"train.optimizer = {session.preset.train.optimizer!r} begins anew here: what the "
                              "other one gathered means nothing to it")
    else:
        session.optimizer.load_state_dict(optimizer)


def _check_ground(session: Session) -> None:
    """Forget validation losses that the coming ones cannot be compared with."""
    progress = session.progress
    if progress.measured and progress.measured != evaluation.ground(session) and progress.validation:
        progress.validation, progress.by_image = {}, {}
        session.recorder.note(progress.step, "the validation loss is measured in another way from here on: the best "
                              "checkpoint is chosen anew")


def _resume(session: Session) -> None:
    """Take the last checkpoint's state, if there is one."""
    run = session.run
    session.progress.global_batch = session.order.global_batch
    session.progress.data = session.material.fingerprint()
    if session.world.first:
        checkpoint.remove_remains(run)
    step = run.last_step()
    if step:
        progress, state, optimizer = checkpoint.load(run.checkpoint(step))
        with naming(run.checkpoint(step)):
            _take_over(session, state, optimizer, progress.fresh)
        progress.fresh, progress.global_batch = [], session.order.global_batch
        if progress.data != session.progress.data:
            session.recorder.note(step, "the data set changed since this run was last trained; it goes on with the new "
                                  "one")
            progress.data = session.progress.data
        session.progress = progress
        _check_ground(session)
    session.progress.measured = evaluation.ground(session)
    session.progress.plan, session.progress.text_quantize = asdict(session.plan), session.text_quantize
