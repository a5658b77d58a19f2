"""bitsandbytes' functions, imported when first needed: that takes a second, and only NF4 and int8 use them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what the 4-bit kernels take and give


def bitsandbytes() -> ModuleType:
    """The module of functions. Raises ImportError, OSError or RuntimeError where it cannot be loaded."""
    from bitsandbytes import functional

    return functional


@cache
def scale_codes(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit dynamic type, in which NF4's scales are stored."""
    return bitsandbytes().create_dynamic_map().to(device)
