"""A base model kept loaded: draws pictures with LoRAs at any strength, and the base model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from trainer import families, gpu, sample
from trainer.errors import UserError
from trainer.faults import out_of_memory
from trainer.memory.blocks import repeated_blocks
from trainer.memory.plan import Plan
from trainer.quantize.available import check
from trainer.schema import FAMILY_GUIDANCE, FAMILY_MODEL, FLOW_FAMILIES, FLOW_GRID
from trainer.session import hold, load_denoiser
from trainer.tryout.applied import Layers, Lora, left_out, read
from trainer.tryout.task import Draw, Settings, trained_side

STEPS, DISTILLED_STEPS = 20, 4
SIDES = {"sd15": 512, "sdxl": 1024, "flux1": 1024, "flux2": 1024}  # pixels, where a file does not say its own
SMALL = 4e9  # bytes of a text encoder that stays loaded beside the denoiser
KEPT_LORAS = 4  # files in memory
KEPT_PROMPTS = 64
UNET_GRID = 8

Tell = Callable[[str, int, int], None]  # what is done, steps done, of all
Conditioning = dict[str, Tensor]


@dataclass(frozen=True)
class Sampling:
    """The settings of a picture, all decided."""

    width: int
    height: int
    steps: int
    guidance: float


class Bench:
    """The parts of one base, each loaded when first needed.  `tell` may raise, to leave a picture half drawn."""

    def __init__(self, settings: Settings, tell: Tell) -> None:
        """Open the base. Raises `UserError` for one that is not there, and for a device that is not."""
        self.settings, self.tell = settings, tell
        self.device = gpu.pick_device(settings.device, "device")
        self.dtype = gpu.pick_dtype(settings.precision, self.device)
        gpu.choose_arithmetic(settings.precision, deterministic=False)
        check(settings.quantize, self.device, "quantize")
        self.family = families.get(settings.family)
        self.base = self.family.open_base(
            settings.base, **{key: getattr(settings, key) for key in FAMILY_MODEL[settings.family]})
        self.objective = self.family.objective(self.base).to(self.device)
        self._denoiser: nn.Module | None = None
        self._offload: Any = None
        self._offloaded = 0  # thirds of the blocks that stay in the host's memory
        self._vae: nn.Module | None = None
        self._encoder: nn.Module | None = None
        self._layers: dict[str, Layers] = {}
        self._loras: dict[tuple[Path, int, int], Lora] = {}
        self._texts: dict[tuple[Any, ...], Conditioning] = {}

    # Deciding

    def lora(self, path: Path) -> Lora:
        """The file, read again only when it has changed. Raises `UserError` for one that is not for this base."""
        stat = path.stat() if path.is_file() else None
        key = (path, stat.st_mtime_ns, stat.st_size) if stat else (path, 0, 0)
        if key not in self._loras:
            self.tell("reading the LoRA", 0, 0)
            found = read(path, self.settings.family)
            while len(self._loras) >= KEPT_LORAS:
                del self._loras[next(iter(self._loras))]
            self._loras[key] = found
        return self._loras[key]

    def sampling(self, draw: Draw, lora: Lora) -> Sampling:
        """What the request leaves out: from the file, the base or the family."""
        usual = trained_side(lora.metadata) or SIDES[self.settings.family]
        grid = FLOW_GRID if self.settings.family in FLOW_FAMILIES else UNET_GRID
        width, height = (max(grid, (side or usual) // grid * grid) for side in (draw.width, draw.height))
        quick = self.base.distilled or self.objective.guidance == "none"
        guidance = FAMILY_GUIDANCE[self.settings.family] if draw.guidance is None else draw.guidance
        return Sampling(width, height, draw.steps or (DISTILLED_STEPS if quick else STEPS), guidance)

    def remarks(self, lora: Lora) -> list[str]:
        """What a person should know of the pictures."""
        lost = left_out(lora, self._names)
        said = [f"{len(lost)} layers of the text encoder are not applied here"] if lost else []
        return [*self.base.notes, *said]

    @property
    def _names(self) -> tuple[str, ...]:
        """Beginnings of the names of layers that are changed here."""
        texts = () if self.settings.family in FLOW_FAMILIES else ("text_encoder",)
        return (self.family.DENOISER, *texts)

    # Drawing

    def picture(self, draw: Draw, lora: Lora, chosen: Sampling, name: str, *, with_lora: bool) -> Image.Image:
        """One picture. name: what `tell` calls it. Raises `UserError` when the file does not fit the base."""
        strength = draw.strength if with_lora else 0.0
        positive = self._encode(draw.prompt, lora, strength)
        guided = self.objective.guidance == "classifier_free" and chosen.guidance > 1
        negative = self._encode(draw.negative, lora, strength) if guided else positive
        while True:
            try:
                return self._draw(draw, lora, strength, chosen, name, positive, negative)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold what was loaded
            self._make_room()

    @torch.no_grad()
    def _draw(self, draw: Draw, lora: Lora, strength: float, chosen: Sampling, name: str, positive: Conditioning,
              negative: Conditioning) -> Image.Image:
        denoiser = self._load_denoiser()
        self._layers[self.family.DENOISER].put(lora, strength, self.device, self.dtype)
        begun = 0

        def goes_on() -> bool:
            nonlocal begun
            self.tell(name, begun, chosen.steps)
            begun += 1
            return False

        latents = list(sample.draw(
            self.family, denoiser, self.objective, conditioning=positive, negative=negative, seeds=[draw.seed],
            steps=chosen.steps, guidance=chosen.guidance, width=chosen.width, height=chosen.height, device=self.device,
            dtype=self.dtype, should_stop=goes_on))
        self.tell(name, chosen.steps, chosen.steps)
        if self._vae is None:
            self._vae = self.family.load_vae(self.base, self.device, torch.float32)
        [picture] = sample.decode(self.family, self._vae.to(self.device), latents)
        return picture

    def _encode(self, text: str, lora: Lora, strength: float) -> Conditioning:
        """A prompt's embeddings; a LoRA on the text encoder changes them."""
        changes = bool(strength and lora.texts and "text_encoder" in self._names)
        key = (text, lora.path, lora.stamp, strength) if changes else (text,)
        if key not in self._texts:
            with self._text_encoder() as (encoder, device), torch.no_grad():
                if changes or "text_encoder" in self._layers:
                    layers = self._layers.get("text_encoder") or Layers(self.family, "text_encoder", encoder)
                    layers.put(lora if changes else None, strength, device, self.family.TEXT_DTYPE)
                    if self._encoder is not None:
                        self._layers["text_encoder"] = layers
                self.tell("reading the prompt", 0, 0)
                found = self.family.encode_prompts(encoder, [text])
            if len(self._texts) >= KEPT_PROMPTS:
                self._texts.clear()
            self._texts[key] = {name: value.cpu() for name, value in found.items()}
        return self._texts[key]

    # Loading

    @contextmanager
    def _text_encoder(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """The text encoder and where it is; a large one only for as long as it is needed."""
        if self._encoder is not None:
            yield self._encoder.to(self.device), self.device
            return
        size = sum(part.bytes for name, part in self.base.parts.items() if name.startswith("text_encoder"))
        encoder, device = self._load_encoder()
        if size <= SMALL and device == self.device:
            self._encoder = encoder
        try:
            yield encoder, device
        finally:
            del encoder
            gpu.free_memory()

    def _load_encoder(self) -> tuple[nn.Module, torch.device]:
        """Beside the denoiser, else in its place, else in the host's memory."""
        self.tell("loading the text encoder", 0, 0)
        for device in (self.device, self.device, torch.device("cpu")):
            try:
                return self.family.load_text_encoder(self.base, device, self.family.TEXT_DTYPE), device
            except Exception as error:
                if not out_of_memory(error):
                    raise
                error.__traceback__ = None
            self._put_denoiser_away()
        raise UserError("the text encoder does not fit into the memory of this machine: close other programs")

    def _load_denoiser(self) -> nn.Module:
        if self._denoiser is None:
            self.tell("loading the base model", 0, 0)
            blocks = self._blocks()
            away = min(self._offloaded * -(-blocks // 3), blocks - 1) if self._offloaded else 0
            plan = Plan(self.settings.quantize, "none", away)
            denoiser = load_denoiser(self.family, self.base, self.device, self.dtype, plan)
            self._offload = hold(self.family, denoiser, plan, self.device)
            self._denoiser = denoiser
            self._layers[self.family.DENOISER] = Layers(self.family, self.family.DENOISER, denoiser)
        elif self._offload is None:
            self._denoiser.to(self.device)
        return self._denoiser

    def _blocks(self) -> int:
        skeleton = self.family.load_denoiser(self.base, torch.device("meta"), self.dtype, "none")
        return len(repeated_blocks(skeleton))

    def _make_room(self) -> None:
        """After the GPU's memory ran out: one third more of the model's blocks stay in the host's."""
        if self.device.type != "cuda" or self._offloaded == 3:
            raise UserError("the memory ran out: choose a smaller picture, or close other programs")
        self._offloaded += 1
        self._forget_denoiser()
        if self._encoder is not None:
            self._encoder = None
            self._layers.pop("text_encoder", None)
        gpu.free_memory()

    def _forget_denoiser(self) -> None:
        self._denoiser = self._offload = None
        self._layers.pop(self.family.DENOISER, None)

    def _put_denoiser_away(self) -> None:
        """Into the host's memory; one that is there in part, or quantised for the GPU, is loaded again when needed."""
        if self._offload is not None or self.settings.quantize != "none":
            self._forget_denoiser()
        elif self._denoiser is not None:
            self._layers[self.family.DENOISER].put(None, 0.0, self.device, self.dtype)
            self._denoiser.to("cpu")
        gpu.free_memory()

    def park(self) -> None:
        """Leave the GPU to others; what comes next begins by moving everything back."""
        self._put_denoiser_away()
        for part in (self._vae, self._encoder):
            if part is not None:
                part.to("cpu")
        gpu.free_memory()
