"""Peak host memory while a sharded model is loaded: python -m tests.bench.host_memory --gib 3 --mode nf4

Anonymous memory alone counts: pages of the mapped files are the system's to take back. On a GPU the model itself lies
there, and the peak is what loading holds beside it; on a CPU the model is part of the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from trainer.families.folders import component
from trainer.families.tensors import fill, mapped_tensors
from trainer.quantize.available import check
from trainer.quantize.model import MODES

LINEARS = 8  # of a block


class Blocks(nn.Module):
    """A model of square linears in repeated blocks."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LINEARS))
                                    for _ in range(blocks))


def make_shards(folder: Path, blocks: int, width: int, shards: int) -> None:
    """A diffusers-like component in bf16, its tensors dealt to `shards` files in order."""
    names = [f"layers.{block}.{linear}.weight" for block in range(blocks) for linear in range(LINEARS)]
    size, where = -(-len(names) // shards), {}
    weight = torch.randn(width, width, dtype=torch.bfloat16)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * size : (number + 1) * size]
        save_file({name: weight.clone() for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"blocks": blocks, "width": width}))


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell a process's anonymous memory")


class Peak:
    """The most anonymous memory that was in use inside the `with`, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self.done = anonymous(), False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()

    def _watch(self) -> None:
        while not self.done:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.002)


def measure(folder: Path, mode: str, device: torch.device) -> dict[str, float]:
    """Bytes beyond what was in use before loading: at the peak and after it (`held`); size of the largest shard."""
    part = component(folder)
    with init_empty_weights(include_buffers=False):
        model = Blocks(**part.config)
    check(mode, device)  # libraries, and the device's own memory on the host
    before = anonymous()
    start = time.perf_counter()
    with Peak() as peak:
        model = fill(model, mapped_tensors(part), device, torch.bfloat16, part.source, mode)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {"peak": peak.bytes - before, "held": anonymous() - before, "seconds": time.perf_counter() - start,
            "shard": max(info.file.stat().st_size for info in part.tensors.values()), "weights": part.bytes}


def load_peak(folder: Path, mode: str, device: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.host_memory", "--folder", str(folder), "--mode", mode,
               "--device", device, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=3.0, help="size of the model in bf16")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--mode", choices=["none", *MODES], default="nf4")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="a folder made before, instead of a new one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if not options.folder:
            width = 4096
            make_shards(folder, max(1, round(options.gib * 2**30 / (2 * width**2 * LINEARS))), width, options.shards)
        found = measure(folder, options.mode, torch.device(options.device))
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.mode} on {options.device}: {found['weights'] / 2**30:.2f} GiB in bf16, largest shard "
          f"{found['shard'] / 2**30:.2f} GiB; anonymous memory at its peak {found['peak'] / 2**30:.2f} GiB, after "
          f"loading {found['held'] / 2**30:.2f} GiB; {found['seconds']:.1f} s")


if __name__ == "__main__":
    main()
