"""Kinds of base model by name: each module says what differs between models, in functions of the same names."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_MODULES = {name: f"trainer.families.{name}" for name in ("sd15", "sdxl", "flux1", "flux2")}


def get(name: str) -> ModuleType:
    """The module of a family, imported when first asked for."""
    return import_module(_MODULES[name])
