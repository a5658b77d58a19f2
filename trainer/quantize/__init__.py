"""Frozen weights in fewer bits: which ways there are, the layers that hold them, and models made of such layers."""

from __future__ import annotations

import logging

_LOGGER = "bitsandbytes.backends.cpu.ops"
_IDLE = "Failed to load CPU gemm_4bit_forward"  # an optional kernel that nothing here uses


def quiet_bitsandbytes() -> None:
    """Keep one message out of terminals and logs, which bitsandbytes writes when it is imported on some CPUs.

    peft imports it before we do, so that this is called first of all in each program.
    """
    logging.getLogger(_LOGGER).addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_IDLE)
