"""Keeps tensors on the disk under the hash of what made them: an entry may be missing, never stale."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from torch import Tensor

from trainer.data.decoding import READERS
from trainer.errors import UserError
from trainer.files import write_soon

Part = str | int | float | bool | None


class Cache:
    """A folder of safetensors files, in sub-folders by the key's first two characters."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._whole: dict[str, tuple[int, int]] = {}  # entries found whole, with size and time of change of their files

    @staticmethod
    def key(*parts: Part) -> str:
        """sha256 of the parts; as JSON, so that ("a", "bc") and ("ab", "c"), 1 and "1" differ."""
        return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    def has(self, key: str) -> bool:
        """Whether the entry is whole (reads it, once: else a torn file would be found only in training)."""
        try:
            state = self._path(key).stat()
        except OSError:
            return False
        seen = state.st_size, state.st_mtime_ns
        if self._whole.get(key) != seen:
            if self._read(key) is None:
                return False
            self._whole[key] = seen
        return True

    def absent(self, keys: Sequence[str]) -> frozenset[str]:
        """The keys that the cache does not have; thousands of entries may be gigabytes, so several are read at a time.
        """
        with ThreadPoolExecutor(READERS) as pool:
            return frozenset(key for key, there in zip(keys, pool.map(self.has, keys)) if not there)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors (on the CPU), or None; a file that is torn or whose checksum is wrong is removed."""
        data = self._read(key)
        return None if data is None else safetensors.torch.load(data)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors under a key, whole or not at all.  Raises `UserError` when the disk refuses."""
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        _, checksum = _checksum(safetensors.torch.save(plain))
        try:
            write_soon(self._path(key), safetensors.torch.save(plain, {"crc32": checksum}))
        except OSError as error:
            raise UserError(f"the cache in {self.root} cannot be written: {error.strerror}; free some space, "
                            "or choose another workspace with --workspace") from error

    def remove_remains(self, age: float = 600.0) -> None:
        """Clear away what killed writers left half done: files that nobody has written to for `age` seconds.

        Other runs write here too, so a younger one may be about to get its name.
        """
        for path in (*self.root.glob(".*"), *self.root.glob("??/.*")):
            with suppress(OSError):  # it got its name, or another run was quicker
                if time.time() - path.stat().st_mtime > age:
                    path.unlink()

    def _read(self, key: str) -> bytes | None:
        """A whole entry's bytes; one that is not whole is removed."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            metadata, checksum = _checksum(data)
            if metadata.get("crc32") == checksum:
                return data
        except (ValueError, AttributeError):  # no JSON, or JSON of another shape
            pass
        path.unlink(missing_ok=True)
        return None

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"


def _checksum(data: bytes) -> tuple[dict[str, str], str]:
    """Metadata of a safetensors file (8 bytes of header length, JSON header, tensors); CRC-32 of all the rest."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    metadata = header.pop("__metadata__", {})
    names = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    return metadata, f"{zlib.crc32(memoryview(data)[8 + length:], names):08x}"
