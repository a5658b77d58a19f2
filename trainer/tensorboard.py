"""Writes TensorBoard event files by hand: a few protobuf records are not worth a large dependency."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

from trainer.errors import NO_ROOM

# Field numbers are those of tensorboard/compat/proto/event.proto and summary.proto.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class TensorBoardWriter:
    """One event file in `folder`; each record is one unbuffered write, so a kill loses at most the last.

    `first_step` above 0 (a resume) tells TensorBoard to forget what earlier files hold from that step on.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 - lives as long as the run
        self._event(_text(3, "brain.Event:2"), 0)  # file_version
        if first_step:
            self._event(_bytes(7, _int(1, 1)), first_step)  # session_log { status: START }

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._value(_text(1, tag) + struct.pack("<Bf", 2 << 3 | _FIXED32, value), step)  # simple_value

    def image(self, tag: str, png_bytes: bytes, w: int, h: int, step: int) -> None:
        """A PNG of w × h pixels."""
        image = _int(1, h) + _int(2, w) + _int(3, 3) + _bytes(4, png_bytes)  # height, width, RGB, data
        self._value(_text(1, tag) + _bytes(4, image), step)

    def close(self) -> None:
        self._file.close()

    def _value(self, value: bytes, step: int) -> None:
        self._event(_bytes(5, _bytes(1, value)), step)  # summary { value }

    def _event(self, what: bytes, step: int) -> None:
        data = struct.pack("<Bd", 1 << 3 | _FIXED64, time.time()) + _int(2, step) + what  # wall_time, step
        length = struct.pack("<Q", len(data))
        record = length + _masked_crc(length) + data + _masked_crc(data)
        try:
            written = self._file.write(record)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return  # a full disk: the run's events tell the same
        if written < len(record):  # readers would stop at half a record
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli, reflected
        table.append(byte)
    return table


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and offset as TFRecord files do, since a checksum of checksums is weak."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
