"""Weight files of feature extractors: read safely, checked against their layout, normalisation fused."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.errors import UserError

BN_EPS = 1e-3  # of both extractors, as TensorFlow has it
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def load(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth file, without running any code of it. Raises `UserError` when it is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a file of weights that can be read safely ({reason}). Fetch it "
                        "again.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no table of weights. Fetch it again.")
    return {key: value.float() for key, value in state.items() if not key.endswith("num_batches_tracked")}


def fill(layers: dict[str, tuple[str, nn.Conv2d]], state: dict[str, Tensor], path: Path,
         spare: tuple[str, ...]) -> None:
    """Load convolutions with the batch normalisation that follows each folded in.

    layers: name of a convolution in the file → name of its normalisation there, and where it goes. `spare`
    names what the file holds and features do not need. Raises `UserError` unless the file has exactly this
    layout.
    """
    expected: dict[str, torch.Size] = {}
    for name, (norm, conv) in layers.items():
        expected[f"{name}.weight"] = conv.weight.shape
        expected |= {f"{norm}.{part}": conv.weight.shape[:1] for part in STATISTICS}
    _check(expected, {key: value for key, value in state.items() if key not in spare}, path)
    for name, (norm, conv) in layers.items():
        gain, shift, mean, variance = (state[f"{norm}.{part}"] for part in STATISTICS)
        gain = gain / (variance + BN_EPS).sqrt()
        conv.weight.data = state[f"{name}.weight"] * gain.view(-1, 1, 1, 1)
        conv.bias.data = shift - mean * gain


def _check(expected: dict[str, torch.Size], state: dict[str, Tensor], path: Path) -> None:
    faults = [f"{key} is missing" for key in expected if key not in state]
    faults += [f"{key} is not known" for key in state if key not in expected]
    faults += [f"{key} has shape {tuple(state[key].shape)}, not {tuple(shape)}"
               for key, shape in expected.items() if key in state and state[key].shape != shape]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path} does not have the layout of this extractor: {'; '.join(faults[:3])}{more}. "
                        "Fetch the right file.")
