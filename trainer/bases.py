"""Base models that other programs already have here: of which family, and whether all their parts were found.

Reads directory listings and the headers of safetensors files, never weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.families.folders import is_complete, read_json, weight_files
from trainer.families.header import Header, TensorInfo, read_header
from trainer.families.recognise import (
    FAMILIES,
    KINDS,
    encoder_name,
    file_kind,
    folder_kind,
    klein_is_distilled,
    text_kind,
)
from trainer.model_folders import Place, hub_id, unique, walk

COMPONENTS = {  # of a diffusers folder
    "sd15": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "flux1": ("transformer", "vae", "text_encoder", "text_encoder_2"),
    "flux2": ("transformer", "vae", "text_encoder"),
}
VAES = {4: "the VAE of SD 1.5 or SDXL", 16: "Flux.1's VAE, such as ae.safetensors",  # by channels of the latents
        32: "Flux.2's VAE, such as flux2-vae.safetensors"}
# Parts that have a family's shapes and are another model's, by their names
STRANGERS = {"flux1": ("sd3", "wan", "qwen", "hidream"), "sd15": ("xl",), "sdxl": ("1-5", "1.5", "ft-mse", "ft-ema")}
USUAL = ("ae.", "flux2-vae", "sdxl_vae", "vae-ft-mse", "clip_l.", "clip_g.", "t5xxl_fp16")  # are taken before others
CLIP_L = 768  # how wide SDXL's first text encoder is
MULTILINGUAL = 100_000  # tokens: a T5 with more is another model's
T5_TOKENIZER = "google-t5/t5-base"  # on the hub, 2 MB: no single file has it
TABLES = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")

Need = tuple[str, int]  # ("vae", latent channels), or a text encoder's kind and width


@dataclass(frozen=True)
class Found:
    """A base model."""

    family: str  # "": of none that is trained here; `note` says what it is
    base: str  # what model.base is set to
    name: str
    program: str  # where it was found
    bytes: int
    parts: dict[str, str] = field(default_factory=dict)  # settings of [model] that go with it
    missing: tuple[str, ...] = ()  # what was not found, in words
    note: str = ""

    @property
    def is_ready(self) -> bool:
        return bool(self.family) and not self.missing

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"missing": list(self.missing), "ready": self.is_ready}


@dataclass(frozen=True)
class _File:
    """What the header of a file tells."""

    path: Path
    bytes: int
    kind: str  # a key of KINDS, or "damaged"
    has: dict[Need, str] = field(default_factory=dict)  # parts inside, and their names
    needs: dict[str, Need] = field(default_factory=dict)  # of a denoiser: setting -> part
    note: str = ""


class Index:
    """What was found, by a file's path, time and size: a second look reads only what is new."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], _File] = {}
        self._lock = threading.Lock()

    def find(self, places: Iterable[Place]) -> list[Found]:
        """All base models in these places: those that are ready first, then by family and name."""
        with self._lock:
            files: dict[Path, tuple[str, _File]] = {}
            found: dict[str, Found] = {}
            for place in unique(places):
                for path, is_folder in walk(place):
                    if is_folder:
                        one = _look_into(path, place.program)
                        found.setdefault(one.base, one)
                    elif path.resolve() not in files and (known := self._look_at(path)):
                        files[path.resolve()] = place.program, known
        parts = [known for _, known in files.values() if known.kind in ("vae", "text_encoder")]
        for program, known in files.values():
            if known.kind not in ("vae", "text_encoder", "lora", "embedding", "controlnet", "other"):
                found[str(known.path)] = _with_parts(known, program, parts)
        order = [*FAMILIES, ""]
        return sorted(found.values(), key=lambda one: (order.index(one.family), not one.is_ready, one.name.lower()))

    def _look_at(self, path: Path) -> _File | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        key = path, stat.st_mtime_ns, stat.st_size
        if key not in self._known:
            try:
                self._known[key] = _describe(read_header(path), stat.st_size)
            except UserError as error:
                self._known[key] = _File(path, stat.st_size, "damaged", note=str(error))
            except OSError:
                return None
        return self._known[key]


def _describe(header: Header, size: int) -> _File:
    tensors, kind = header.tensors, file_kind(header.tensors)
    note = KINDS[kind] + ", which is not trained here" if kind not in FAMILIES else ""
    has = _inside(tensors)
    needs = _needs(kind, tensors, has)
    if kind == "flux2" and needs.get("text_encoder", ("",))[0] == "qwen3":
        note = _klein_note(" ".join(header.metadata.values()), header.file.name)
    elif kind == "flux2":
        note = "dev; give its tokenizer folder as model.tokenizer"
    elif kind == "flux1" and not _ending(tensors, "guidance_in.in_layer.weight", "guidance_embedder.linear_1.weight"):
        note = "schnell, distilled to four steps: Flux.1 dev is the better base"
    return _File(header.file, size, kind, has, needs, note)


def _klein_note(*said: str) -> str:
    told = klein_is_distilled(*said)
    return {True: "distilled to four steps: train on the base instead, its LoRA works on both", False: "",
            None: "not told whether it is the base or the distilled one; see model.distilled"}[told]


def _needs(kind: str, tensors: Mapping[str, TensorInfo], has: Mapping[Need, str]) -> dict[str, Need]:
    """Which parts a denoiser goes with, from the widths of its inputs."""
    try:
        if kind in ("sd15", "sdxl"):
            width = _shape(tensors, "attn2.to_k.weight")[1]
            if kind == "sd15":
                return {"vae": ("vae", 4), "text_encoder": ("clip", width)}
            clips = sorted(size for part, size in has if part == "clip")
            first = clips[0] if sum(clips) == width else CLIP_L
            return {"vae": ("vae", 4), "text_encoder": ("clip", first), "text_encoder_2": ("clip", width - first)}
        if kind not in FAMILIES:
            return {}
        vae = ("vae", _shape(tensors, "img_in.weight", "x_embedder.weight")[1] // 4)
        text = _shape(tensors, "txt_in.weight", "context_embedder.weight")[1]
        if kind == "flux1":
            pooled = _shape(tensors, "vector_in.in_layer.weight", "text_embedder.linear_1.weight")[1]
            return {"vae": vae, "text_encoder": ("clip", pooled), "text_encoder_2": ("t5", text)}
        guided = _ending(tensors, "guidance_in.in_layer.weight", "guidance_embedder.linear_1.weight")
        return {"vae": vae, "text_encoder": ("mistral" if guided else "qwen3", text // 3)}
    except (LookupError, AttributeError):
        return {}


def _inside(tensors: Mapping[str, TensorInfo]) -> dict[Need, str]:
    """The VAE and the text encoders that a file holds."""
    found: dict[Need, str] = {}
    vae = _ending(tensors, "decoder.conv_in.weight")
    if vae and len(vae.shape) == 4:  # videos' have one more
        found["vae", vae.shape[1]] = vae.name
    for name, info in tensors.items():
        if name.endswith(TABLES) and len(info.shape) == 2:
            prefix = name[: -len(next(table for table in TABLES if name.endswith(table)))]
            kind = text_kind({other: info for other, info in tensors.items() if other.startswith(prefix)}
                             if prefix else tensors)
            if kind and not (kind == "t5" and info.shape[0] > MULTILINGUAL):
                found[kind, info.shape[1]] = name
    return found


def _with_parts(known: _File, program: str, parts: list[_File]) -> Found:
    """The base that a file is, with the parts that it lacks from other files."""
    if known.kind not in FAMILIES:
        return Found("", str(known.path), known.path.stem, program, known.bytes, note=known.note)
    given, missing = {}, []
    if not known.needs:
        missing.append("its denoiser is not whole: download it again")
    for setting, need in known.needs.items():
        if need in known.has:
            continue
        if best := _best(known, need, parts):
            given[setting] = str(best.path)
        else:
            what = VAES.get(need[1], "its VAE") if need[0] == "vae" else f"the text encoder {encoder_name(*need)}"
            missing.append(f"{what}, for model.{setting}")
    if known.kind == "flux1" and not missing:
        given["tokenizer_2"] = T5_TOKENIZER
    return Found(known.kind, str(known.path), known.path.stem, program, known.bytes, given, tuple(missing), known.note)


def _best(known: _File, need: Need, parts: list[_File]) -> _File | None:
    """Of the files that hold this part, the one nearest by: usual names first, then in the same program, then large."""
    strangers = STRANGERS.get(known.kind, ()) if need[0] == "vae" else ()
    fitting = [part for part in parts if need in part.has
               and not any(word in part.path.name.lower() for word in strangers)]
    return max(fitting, default=None, key=lambda part: (
        part.path.name.lower().startswith(USUAL), _shared(part.path, known.path), part.bytes, str(part.path)))


def _shared(one: Path, other: Path) -> int:
    """How many folders two files have in common."""
    return next((number for number, pair in enumerate(zip(one.parts, other.parts)) if pair[0] != pair[1]), 0)


def _look_into(folder: Path, program: str) -> Found:
    """The base that a diffusers folder is."""
    repo = hub_id(folder)
    base, name = repo or str(folder), repo or folder.name
    try:
        index, unet = read_json(folder / "model_index.json"), folder / "unet" / "config.json"
        kind = folder_kind(index, read_json(unet) if unet.is_file() else None)
    except (UserError, OSError) as error:
        return Found("", base, name, program, 0, note=str(error))
    if kind not in FAMILIES:
        return Found("", base, name, program, 0, note=f"{KINDS[kind]}, which is not trained here")
    whole = [part for part in COMPONENTS[kind] if is_complete(folder, [part])]
    size = sum(file.stat().st_size for part in whole for file in weight_files(folder / part))
    missing = tuple(f"the folder {part}, whole" for part in COMPONENTS[kind] if part not in whole)
    note = ""
    if kind == "flux2" and "klein" in f"{name} {index.get('_class_name')}".lower():
        told = index.get("is_distilled")
        note = _klein_note(repo, folder.name) if told is None else _klein_note("klein 4b" if told else "klein 4b base")
    return Found(kind, base, name, program, size, missing=missing, note=note)


def _shape(tensors: Mapping[str, TensorInfo], *endings: str) -> tuple[int, ...]:
    found = _ending(tensors, *endings)
    if found is None:
        raise LookupError(endings[0])
    return found.shape


def _ending(tensors: Mapping[str, TensorInfo], *endings: str) -> TensorInfo | None:
    return next((info for name, info in tensors.items() if name.endswith(endings)), None)
