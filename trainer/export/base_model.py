"""A base model on the disk as tools change it: where each module's weight lies, and tensors read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.export import names
from trainer.export.formats import FAMILIES
from trainer.export.names import Naming, Place
from trainer.export.stacked import part_heights
from trainer.families import clip_pair, clip_text
from trainer.families.folders import component, explain_no_model, read_json, weight_files
from trainer.families.recognise import KINDS, file_kind, folder_kind
from trainer.families.tensors import Header, TensorInfo, read_header

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks."
_OPEN_CLIP_PARTS = {"attn.in_proj_weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "attn.out_proj.weight": ("self_attn.out_proj",), "mlp.c_fc.weight": ("mlp.fc1",),
                    "mlp.c_proj.weight": ("mlp.fc2",)}


@dataclass(frozen=True)
class Slot:
    """A tensor that LoRAs can change, and the modules whose rows it holds one below the other."""

    info: TensorInfo
    place: Place

    @property
    def heights(self) -> list[int]:
        """Rows of each module."""
        return part_heights(self.place.modules, self.info.shape[0], self.info.shape[1])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each module's weight."""
        return {module: (height, *self.info.shape[1:]) for module, height in zip(self.place.modules, self.heights)}


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint in one file, or a diffusers folder; `headers` are those of the files that hold weights."""

    path: Path
    family: str
    headers: list[Header]
    slots: list[Slot]

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Module path -> shape of its weight."""
        return {module: shape for slot in self.slots for module, shape in slot.shapes.items()}

    @property
    def components(self) -> set[str]:
        """Of which the weights are here, such as "unet"."""
        return {module.partition(".")[0] for slot in self.slots for module in slot.place.modules}


def open_base(path: Path) -> BaseModel:
    """A base model by its headers. Raises UserError for one that is missing, damaged, unknown, or quantised."""
    if path.is_dir():
        return _open_folder(path)
    header = read_header(path)
    kind = file_kind(header.tensors)
    if kind not in FAMILIES:
        raise UserError(f"{path} is {KINDS[kind]}: give a base model of {', '.join(FAMILIES.values())}")
    naming = {style: names.naming(kind, style) for style in ("native", "peft")}
    slots = [Slot(info, place) for name, info in header.tensors.items()
             if len(info.shape) in (2, 4) and (place := place_of(name, kind, naming))]
    return BaseModel(path, kind, [header], _checked(path, slots))


def _open_folder(folder: Path) -> BaseModel:
    if not (folder / "model_index.json").is_file():
        raise explain_no_model(folder)
    unet = folder / "unet" / "config.json"
    kind = folder_kind(read_json(folder / "model_index.json"), read_json(unet) if unet.is_file() else None)
    if kind not in FAMILIES:
        raise UserError(f"{folder} is {KINDS[kind]}: give a base model of {', '.join(FAMILIES.values())}")
    naming, headers, slots = names.naming(kind, "peft"), [], []
    for name in COMPONENTS:
        if not (folder / name / "config.json").is_file():
            continue
        component(folder / name)  # it says what is wrong with it
        for file in weight_files(folder / name):
            headers.append(read_header(file))
            for tensor, info in headers[-1].tensors.items():
                module = names.canonical(f"{name}.{tensor.removesuffix('.weight')}")
                if tensor.endswith(".weight") and len(info.shape) in (2, 4) and naming.of(module):
                    slots.append(Slot(info, Place(tensor, (module,))))
    return BaseModel(folder, kind, headers, _checked(folder, slots))


def place_of(tensor: str, family: str, naming: Mapping[str, Naming]) -> Place | None:
    """What a tensor of a single file holds, by any naming that such files have; None: nothing that LoRAs change."""
    if tensor.startswith(_OPEN_CLIP):
        number, _, rest = tensor.removeprefix(_OPEN_CLIP).partition(".")
        modules = [f"text_encoder_2.text_model.encoder.layers.{number}.{part}"
                   for part in _OPEN_CLIP_PARTS.get(rest, ())]
        return Place(tensor, tuple(modules)) if modules else None
    if not tensor.endswith(".weight"):
        return None
    path = tensor.removesuffix(".weight")
    for prefix in (*clip_pair.PREFIXES, *clip_text.PREFIXES):
        if path.startswith(prefix):
            return naming["peft"].at(names.canonical("text_encoder." + path.removeprefix(prefix)))
    inner = path.removeprefix("model.diffusion_model.")
    denoiser = "unet." if family in ("sd15", "sdxl") else "transformer."
    return (naming["native"].at(path) or naming["native"].at(f"diffusion_model.{inner}")
            or naming["peft"].at(denoiser + inner))


def _checked(path: Path, slots: list[Slot]) -> list[Slot]:
    """The slots, if their tensors can be calculated with."""
    for slot in slots:
        if slot.info.dtype not in DTYPES:
            raise UserError(f"{path} keeps its weights as {slot.info.dtype}, in which small changes are lost: use its "
                            "bf16, fp16 or fp32 file")
    if not slots:
        raise UserError(f"{path} has no layer that a LoRA changes: the file is damaged, or not a base model")
    return slots


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor from its file, by plain reading: a mapped file would count as memory, and grow with what is read."""
    buffer = bytearray(info.end - info.start)
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        if stream.readinto(buffer) != len(buffer):
            raise UserError(f"{info.file} is cut short: download it again")
    return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).view(info.shape)


def read_modules(slot: Slot) -> Iterator[tuple[str, Tensor]]:
    """Each module of a slot with its weight in fp32, rows in the module's own order."""
    weight = read_tensor(slot.info).float()
    if slot.place.swapped:
        weight = torch.cat(weight.chunk(2)[::-1])
    yield from zip(slot.place.modules, weight.split(slot.heights))
