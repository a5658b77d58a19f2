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

UNET = Path(__file__).parents[2] / "presets/demo/base/unet/config.json"
RESOLUTION, BATCH, RANK = 128, 4, 8  # as presets/demo.toml has them
WARMUP, TIMED = 2, 15


def main() -> None:
    config = json.loads(UNET.read_text("utf-8"))
    size = Size("sd15", config, RESOLUTION, BATCH, (77, config["cross_attention_dim"]))
    device, dtype = torch.device("cpu"), torch.float32
    denoiser = true_size.denoiser_of(size, "none", device, dtype)
    step = peer.build(size, denoiser, RANK, False, device, dtype, *true_size.batch_of(size, dtype)).step
    times = []
    for number in range(WARMUP + TIMED):
        begun = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begun)
    print(f"{statistics.mean(times[WARMUP:]):.4f}")


if __name__ == "__main__":
    main()
