"""Whether a device can hold weights in so few bits, asked before hours of work, and a plain message if it cannot."""

from __future__ import annotations

import torch

from trainer.errors import UserError, first_line
from trainer.quantize.model import quantised_linear


def check_settings(quantize: str, quantize_text_encoder: str, device: torch.device) -> None:
    """Raise UserError for a mode that the preset asks for itself and the device cannot hold."""
    for setting, mode in (("quantize", quantize), ("quantize_text_encoder", quantize_text_encoder)):
        if mode != "auto":
            check(mode, device, f"memory.{setting}")


def works(mode: str, device: torch.device) -> bool:
    """Whether weights of this mode can be made and read on the device."""
    try:
        check(mode, device)
        return True
    except UserError:
        return False


def check(mode: str, device: torch.device, setting: str = "memory.quantize") -> None:
    """Raise UserError, naming the setting, unless weights of this mode can be made and read on the device."""
    if mode == "none" or device.type == "meta":
        return
    try:
        found = quantised_linear(torch.ones(2, 64, device=device), None, None, mode, torch.float32).weight
        problem = None if torch.allclose(found, torch.ones_like(found), atol=1e-3) else "its kernels give wrong weights"
    except (ImportError, OSError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        problem = error
    if problem is not None:
        raise UserError(_message(mode, device, setting, problem))


def _message(mode: str, device: torch.device, setting: str, problem: object) -> str:
    reason = first_line(problem)
    if mode == "fp8":
        return f"{setting} = 'fp8' does not work on this device ({device}: {reason}): set it to 'none'"
    if isinstance(problem, ImportError):
        return (f"{setting} = '{mode}' needs the package bitsandbytes, which cannot be loaded here ({reason}): install "
                "it with `pip install bitsandbytes`, or set it to 'fp8' or 'none'")
    return (f"{setting} = '{mode}': bitsandbytes has no working kernels for this device ({device}: {reason}). Install "
            "the version that requirements.txt names, or set it to 'fp8' or 'none'")
