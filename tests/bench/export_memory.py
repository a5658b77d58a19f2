"""Peak host memory of the LoRA tools at klein 9B's true size: python -m tests.bench.export_memory [--ranks 16 64]

Each tool runs as a process of its own. Counted is its anonymous memory, looked at every few milliseconds: pages of
files that it has mapped are the system's to take back. The base model is a file of klein 9B's own 18 GB that takes no
room on the disk, since what is not written of it reads as zeros; the tuned one differs from it in a few layers, the
largest among them, for a decomposition costs seconds each. What `bake` writes takes its 18 GB: --no-bake spares them.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from trainer.export.sizes import true_sizes
from trainer.export.writer import write
from trainer.families.header import read_header

LIMIT = 8e9  # bytes
LOOK = 0.005  # seconds
MODEL = "klein 9B"
CHANGED = 6  # layers of the tuned model


def sizes() -> dict[str, tuple[int, ...]]:
    """Shapes of all linear layers of klein 9B."""
    found = true_sizes("flux2")
    return found[next(name for name in found if "9B" in name)]


def make_lora(path: Path, rank: int, seed: int) -> Path:
    """A LoRA for every layer of the model's blocks, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(name, torch.randn(m, rank, generator=generator) * 0.01, torch.randn(rank, n, generator=generator), None)
             for name, (m, n) in sizes().items() if "transformer_blocks." in name]
    write(path, pairs, family="flux2", dtype="bf16", metadata={"ss_base_model_version": "flux2_klein_9b"})
    return path


def make_base(path: Path) -> Path:
    """The model's layers in bf16, as a file with holes."""
    table, place = {}, 0
    for name, shape in sizes().items():
        end = place + 2 * math.prod(shape)
        table[f"{name.removeprefix('transformer.')}.weight"] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path


def make_tuned(path: Path) -> Path:
    """The same, with random numbers in the largest layer and some others."""
    header = read_header(make_base(path))
    infos = sorted(header.tensors.values(), key=lambda info: -info.count)
    with path.open("r+b") as file:
        for info in infos[:: max(1, len(infos) // CHANGED)][:CHANGED]:
            file.seek(info.start)
            file.write(torch.randn(info.count).bfloat16().view(torch.uint8).numpy().tobytes())
    return path


def measure(arguments: list[str]) -> tuple[float, float]:
    """Peak of anonymous memory in bytes, and seconds."""
    begun, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "trainer.export", *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        line = next((line for line in status.read_text().splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
        peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(LOOK)
    if process.returncode and arguments[0] != "verify":  # verify exits 1 for a program that cannot read the file
        raise SystemExit(process.stderr.read().decode())
    return peak, time.monotonic() - begun


def tools(folder: Path, rank: int, base: Path, tuned: Path, bakes: bool) -> dict[str, list[str]]:
    """Each tool with its arguments."""
    files = [str(make_lora(folder / f"lora-{rank}-{seed}.safetensors", rank, seed)) for seed in (1, 2)]
    out = ["--out", str(folder / "out.safetensors")]
    found = {
        "inspect": ["inspect", files[0]],
        "verify": ["verify", files[0]],
        "verify --base": ["verify", files[0], "--base", str(base)],
        "convert to F6": ["convert", files[0], "--to", "F6", *out],
        "resize --rank": ["resize", files[0], "--rank", str(rank // 2), *out],
        "resize --energy": ["resize", files[0], "--energy", "0.9", *out],
        "resize --dynamic": ["resize", files[0], "--dynamic", "0.9", *out],
        "merge exactly": ["merge", *files, *out],
        "merge with weights": ["merge", *files, "--weights", "0.7", "0.5", *out],
        "merge --rank": ["merge", *files, "--rank", str(rank), *out],
        "compare": ["compare", *files],
        "extract": ["extract", str(base), str(tuned), "--rank", str(rank), *out],
    }
    if bakes:
        found["bake"] = ["bake", str(base), files[0], "--out", str(folder / "baked.safetensors")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--no-bake", action="store_true", help="leave out what writes 18 GB")
    options = parser.parse_args()
    worst = 0.0
    print(f"| tool | rank of {MODEL}'s LoRA | peak memory | seconds |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, tuned = make_base(folder / "base.safetensors"), make_tuned(folder / "tuned.safetensors")
        for rank in options.ranks:
            for tool, arguments in tools(folder, rank, base, tuned, not options.no_bake).items():
                peak, seconds = measure(arguments)
                worst = max(worst, peak)
                print(f"| {tool} | {rank} | {peak / 1e9:.2f} GB | {seconds:.0f} |", flush=True)
                (folder / "baked.safetensors").unlink(missing_ok=True)
    print(f"the most: {worst / 1e9:.2f} GB, of {LIMIT / 1e9:.0f} GB that there may be")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
