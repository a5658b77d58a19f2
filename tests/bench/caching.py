"""Images a second while latents are cached, beside what the VAE and the decoders do alone:
`python -m tests.bench.caching --families sdxl flux2 --images 300`.

VAEs have their true size and random weights. Images are photographs of 4 to 12 megapixels as far as decoders can tell,
in JPEG, PNG and WebP, and made first. `--tiny` rehearses on a CPU with small ones; `--decoders 0 1 2` times decoding
alone, with so many processes (0: threads).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from tests.bench import true_size
from tests.bench.memory import device_name, peak, wait
from trainer import families, preset
from trainer.data.cache import Cache
from trainer.data.dataset import wanted
from trainer.data.decoding import Decoders, processes_for
from trainer.material import Material
from trainer.session import ENCODE_BATCH
from trainer.setup import prepare_latents

PHOTOGRAPHS = (("jpg", (4000, 3000), {"quality": 92}), ("png", (2400, 1800), {"compress_level": 3}),
               ("jpg", (2000, 3000), {"quality": 92}), ("webp", (3000, 2000), {"quality": 85, "method": 0}))
HEAD = ("| VAE | pixels | VAE alone | decoders alone | cached by a run | of the slower one | processes | peak GiB |\n"
        "|---|---|---|---|---|---|---|---|")


def make_images(folder: Path, count: int, scale: float) -> None:
    """`count` different files that decode like photographs of `PHOTOGRAPHS`, times `scale` a side.

    One of each kind is drawn; the others have a few bytes more at their end, which decoders pass over.
    """
    random = np.random.default_rng(0)
    masters = []
    for suffix, (width, height), options in PHOTOGRAPHS:
        size = round(scale * width), round(scale * height)
        coarse = Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).resize(size)
        grain = random.normal(0, 6, (size[1], size[0], 1)).astype(np.int16)
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        file = folder / f"master.{suffix}"
        Image.fromarray(pixels).save(file, **options)
        masters.append((suffix, file.read_bytes()))
        file.unlink()
    for number in range(count):
        suffix, data = masters[number % len(masters)]
        (folder / f"{number:05d}.{suffix}").write_bytes(data + number.to_bytes(4, "little"))


def material_of(family: str, folder: Path, resolution: int) -> Material:
    """What a run of such a preset would be trained on."""
    lines = [f'[model]\nfamily = "{family}"\nbase = "random"',
             f'[data]\nfolder = "{folder.as_posix()}"\nresolution = {resolution}', "[train]\nsteps = 1"]
    chosen = preset.complete(preset.parse("\n".join(lines), "caching.toml", ["evaluate.holdout=0"]), Path())
    return Material(chosen, families.get(family).bucket_step(resolution))


def vae_alone(family: Any, vae: torch.nn.Module, material: Material, cache: Cache, device: torch.device) -> float:
    """Images a second through the VAE, in a run's own batches, their pixels on the device already."""
    store = material.latent_store(material.train, cache, "alone", torch.float32, training=True)
    shapes = [(len(jobs), 3, *reversed(store.sizes[jobs[0].item])) for jobs in store._batches(ENCODE_BATCH)]
    ready = {shape: torch.rand(shape, device=device) * 2 - 1 for shape in shapes}
    with torch.no_grad():
        for pixels in ready.values():  # libraries choose their kernels
            family.encode_images(vae, pixels)
        wait(device)
        began = time.perf_counter()
        for shape in shapes:
            family.encode_images(vae, ready[shape])
        wait(device)
    return sum(shape[0] for shape in shapes) / (time.perf_counter() - began)


def decoders_alone(material: Material, processes: int) -> float:
    """Images a second decoded and resized, and nothing done with them."""
    files = [wanted(item, material.size(item)) for item in material.train]
    began = time.perf_counter()
    with Decoders(processes) as decoders:
        for future in decoders.pictures(files):
            future.result()
    return len(files) / (time.perf_counter() - began)


def cached_by_a_run(family: Any, vae: torch.nn.Module, material: Material, cache: Cache, device: torch.device) -> float:
    """Images a second in a run's own caching, from the first file to the last entry on the disk."""
    around = SimpleNamespace(load_vae=lambda base, device, dtype: vae, encode_images=family.encode_images)
    recorder = SimpleNamespace(phase=lambda *told: None)
    began = time.perf_counter()
    latents, _ = prepare_latents(around, SimpleNamespace(vae_id="random"), material, cache, device, recorder,
                                 lambda: None)
    seconds = time.perf_counter() - began
    if material.skipped or latents.missing():
        raise SystemExit(f"not all was cached: {material.skipped[:3]}")
    return len(material.train) / seconds


def measure(name: str, folder: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A row: the three rates, one after the other."""
    family, own = families.get(name), 128 if options.tiny else true_size.RESOLUTIONS[name]
    resolution = options.resolution or own
    material = material_of(name, folder, resolution)
    processes = processes_for([wanted(item, material.size(item)) for item in material.train])
    vae = true_size.vae_of(name, device, options.tiny)
    with tempfile.TemporaryDirectory(dir=folder.parent) as entries:
        alone = vae_alone(family, vae, material, Cache(Path(entries)), device)
        decoded = decoders_alone(material, processes)
        cached = cached_by_a_run(family, vae, material, Cache(Path(entries)), device)
    return {"vae": name, "resolution": resolution, "images": len(material.train), "alone": alone, "decoded": decoded,
            "cached": cached, "processes": processes, "cores": psutil.cpu_count(), "device": device_name(device),
            "torch": torch.__version__, "peak": peak(device)}


def line(row: dict[str, Any]) -> str:
    slower = min(row["alone"], row["decoded"])
    return (f"| {row['vae']} | {row['resolution']} | {row['alone']:.1f} images/s | {row['decoded']:.1f} "
            f"| {row['cached']:.1f} | {row['cached'] / slower:.0%} | {row['processes']} of {row['cores']} cores "
            f"| {row['peak'] / 2**30:.1f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(true_size.RESOLUTIONS),
                        default=list(true_size.RESOLUTIONS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--resolution", type=int, default=0, help="in pixels, instead of each family's own")
    parser.add_argument("--decoders", type=int, nargs="+", default=[], help="time only decoding, in so many processes")
    parser.add_argument("--tiny", action="store_true", help="small images and VAEs, on the CPU")
    parser.add_argument("--json", type=Path, help="file that rows are added to, one JSON object a line")
    options = parser.parse_args(arguments)
    device = torch.device("cpu") if options.tiny or not torch.cuda.is_available() else torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "images"
        folder.mkdir()
        make_images(folder, options.images, 0.1 if options.tiny else 1.0)
        for processes in options.decoders:
            rate = decoders_alone(material_of("sdxl", folder, options.resolution or 1024), processes)
            print(f"{processes or 'no'} processes: {rate:.2f} images/s decoded", flush=True)
        if options.decoders:
            return
        print(HEAD, flush=True)
        for name in options.families:
            row = measure(name, folder, options, device)
            print(line(row), flush=True)
            if options.json:
                with options.json.open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
