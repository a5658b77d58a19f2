"""Seconds that the peer's step takes for the demo's own work, on the CPU: what the demo's time is held against where a
machine has less to give than two quiet cores.

    python -m tests.bench.demo_step
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from tests.bench import peer, true_size
from tests.bench.true_size import Size
from trainer import preset

WARMUP, TIMED = 2, 15


def main() -> None:
    demo = preset.load(preset.SHIPPED / "demo.toml")
    config = json.loads((Path(demo.model.base) / "unet/config.json").read_text("utf-8"))
    size = Size("sd15", config, demo.data.resolution, demo.train.batch_size, (77, config["cross_attention_dim"]))
    device, dtype = torch.device("cpu"), torch.float32
    denoiser = true_size.denoiser_of(size, "none", device, dtype)
    step = peer.build(size, denoiser, demo.adapter.rank, False, device, dtype, *true_size.batch_of(size, dtype)).step
    times = []
    for number in range(WARMUP + TIMED):
        begun = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begun)
    print(f"{statistics.mean(times[WARMUP:]):.4f}")


if __name__ == "__main__":
    main()
