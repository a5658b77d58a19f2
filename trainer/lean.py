"""Imports less: diffusers loads, of what is installed, all that it could need, and most of it is not needed here."""

from __future__ import annotations

import sys

UNUSED = ("bitsandbytes", "peft", "transformers")  # what it has for LoRA files, quantisation and pipelines


def begin() -> None:
    """Let diffusers take those packages for not installed, in this process, for good; others can import them.

    That saves a second or two of every start. Only for a program of its own, and before diffusers is imported: its LoRA
    loaders and pipelines, which tests use, do not work after it.
    """
    if "diffusers" in sys.modules:
        return
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: Python's own way to say that there is none
    try:
        import diffusers.models.modeling_utils  # noqa: F401 - all that looks for them
    finally:
        for name in hidden:
            del sys.modules[name]
