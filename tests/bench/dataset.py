"""What the data set tab costs with thousands of images of 1 to 4 megapixels: python -m tests.bench.dataset

    python -m tests.bench.dataset --images 5000 --folder /tmp/bench     (the folder is kept, and used again)

Makes the images from a few photographs, each with bytes and a caption of its own, and measures opening with and
without what an earlier start knows, listing, searching, saving, bulk previews and changes, undo, the health check, the
overview, and the app's memory with Gradio in it.  What the browser adds is measured by the tab's own tests.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from app.datasets import bulk, health, overview
from app.datasets.data_set import DataSet
from app.datasets.library import Library
from app.datasets.operations import parse
from app.paths import Places

SIZES = [(1024, 1024), (1216, 832), (832, 1216), (1600, 1200), (1365, 2048), (2048, 1365), (2048, 2048), (2560, 1440)]
WORDS = ("red blue cat dog mat tree sky house person smiling standing outdoors indoors portrait masterpiece closeup "
         "window light shadow hat coat table chair river hill cloud street night day film grain").split()


def make_images(folder: Path, count: int) -> None:
    """JPEGs that differ in a comment in their header, with captions of 5 to 25 tags."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [_photograph(size, seed) for seed, size in enumerate(SIZES)]
    for i in range(count):
        comment = f"number {i}".encode()
        head = b"\xff\xd8\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
        (folder / f"{i:05d}.jpg").write_bytes(head + photographs[i % len(photographs)][2:])
        tags = rng.sample(WORDS, rng.randint(5, 25))
        (folder / f"{i:05d}.txt").write_text(", ".join([*tags, f"number{i}"]), encoding="utf-8")


def _photograph(size: tuple[int, int], seed: int) -> bytes:
    grain = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    packed = BytesIO()
    Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).save(packed, "JPEG", quality=85)
    return packed.getvalue()


def best_of(times: int, work: Callable[[], object]) -> float:
    """Milliseconds."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append((time.perf_counter() - began) * 1000)
    return min(found)


def say(what: str, milliseconds: float, limit: float | None = None) -> None:
    wanted = "" if limit is None else f"   wanted: at most {limit:.0f}"
    print(f"{what:58} {milliseconds:9.1f} ms{wanted}", flush=True)


def measure_reading(data_set: DataSet) -> None:
    say("look at the whole folder again", best_of(3, lambda: data_set.index.refresh(at_once=True)))
    say("first page, all names", best_of(5, data_set.list_images), 2000)
    say("search for two words", best_of(5, lambda: data_set.list_images(search="smiling grain")), 100)
    say("search for what one caption has", best_of(5, lambda: data_set.list_images(search="number4321")), 100)
    say("images with one tag", best_of(5, lambda: data_set.list_images(tag="cat")), 100)
    say("sorted by size", best_of(5, lambda: data_set.list_images(sort="largest")), 100)
    say("duplicates", best_of(5, lambda: data_set.list_images(filter="duplicate")), 100)
    say("poll: has anything changed", best_of(20, data_set.info))
    say("tags that begin with", best_of(5, lambda: data_set.tags("ma")))
    say("health check", best_of(2, lambda: health.check(data_set, trigger="sks")))
    say("tags, lengths, tokens", best_of(2, lambda: overview.captions(data_set, "cat")))
    say("buckets", best_of(2, lambda: overview.sizes(data_set, 1024)))


def measure_changes(data_set: DataSet) -> None:
    card = data_set.list_images(count=1)["cards"][0]
    say("save a caption", best_of(1, lambda: data_set.save_caption(card["name"], "something else", card["version"])))
    data_set.undo()
    plain = parse({"kind": "replace", "find": "cat", "replace": "kitten"})
    expression = parse({"kind": "replace", "find": r"(\w+), (\w+)$", "replace": r"\2, \1", "mode": "regex"})
    everywhere = parse({"kind": "add", "text": "sks"})
    for name, operation in (("plain", plain), ("expression", expression), ("add everywhere", everywhere)):
        say(f"bulk preview: {name}", best_of(3, lambda o=operation: bulk.preview(data_set, o)), 500)
    token = bulk.preview(data_set, everywhere)["token"]
    say("bulk change of every caption", best_of(1, lambda: bulk.apply(data_set, everywhere, None, token)))
    say("undo of it", best_of(1, data_set.undo))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--wait", type=float, default=900, help="seconds for all thumbnails")
    options = parser.parse_args()
    import gradio  # noqa: F401 - the app has it in memory, too

    began = psutil.Process().memory_info().rss
    places = Places(options.folder.resolve())
    root = places.datasets / f"bench{options.images}"
    if not root.exists():
        make_images(root, options.images)
    library = Library(places)
    [id] = [row["id"] for row in library.list_sets()["sets"] if row["name"] == root.name]
    opening = time.perf_counter()
    data_set = library.open(id)
    say("open", (time.perf_counter() - opening) * 1000)
    say("first page", best_of(1, data_set.list_images), 2000)
    making, known = time.perf_counter(), data_set.index.known()
    while data_set.index.known() < len(data_set.index.records) and time.perf_counter() - making < options.wait:
        time.sleep(0.2)
    made = data_set.index.known() - known
    if made:
        print(f"{made} thumbnails in the background: {(time.perf_counter() - making) / made * 1000:.1f} ms each")
    measure_reading(data_set)
    measure_changes(data_set)
    again = Library(places)
    say("open after a restart", best_of(1, lambda: again.open(id)), 2000)
    memory = psutil.Process().memory_info().rss
    print(f"memory {memory / 1e6:.0f} MB, of which Gradio {began / 1e6:.0f} MB   wanted: at most 300")
    library.close(), again.close()


if __name__ == "__main__":
    main()
