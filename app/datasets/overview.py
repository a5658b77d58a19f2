"""What a data set is made of: tags, lengths and tokens of captions, and how its images will be cut and counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.datasets import tokens
from app.datasets.data_set import DataSet
from app.datasets.index import Record, tags_of
from trainer import captions as training
from trainer.data import buckets
from trainer.data.order import Order, stream
from trainer.errors import UserError

Answer = dict[str, Any]
Family = Literal["sd15", "sdxl", "flux1", "flux2"]
MOST_TAGS = 500
TOKEN_EDGES = [0, 10, 20, 30, 40, 50, 60, 77, 100, 125, 150, 225, 300, 100_000]
LENGTH_EDGES = [0, 25, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 2000, 1_000_000]
RATIO_EDGES = [0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, 1.05, 1.25, 1.45, 1.7, 2.0, 2.5, 4.0, 1000.0]
PIXEL_EDGES = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 1000.0]  # millions


class Handling(BaseModel):
    """How a run treats captions: the settings of the same names in a preset's [data]."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    trigger: str = ""
    shuffle_tags: bool = False
    keep_tags: int = Field(1, ge=0, le=100)
    caption_variants: int = Field(8, ge=1, le=256)
    caption_dropout: float = Field(0.0, ge=0.0, le=1.0)


def captions(data_set: DataSet, trigger: str = "") -> Answer:
    """Tags with their counts, alone and together with the trigger word; lengths in characters and in CLIP's tokens."""
    records = _included(data_set)
    texts = [record.caption for record in records]
    counts, together, spelled = Counter[str](), Counter[str](), dict[str, Counter[str]]()
    with_trigger = 0
    for text in texts:
        own = {tag.casefold(): tag for tag in tags_of(text)}
        has_trigger = bool(trigger.strip()) and training.has_words(text, trigger.strip())
        with_trigger += has_trigger
        counts.update(own.keys())
        together.update(own.keys() if has_trigger else ())
        for folded, tag in own.items():
            spelled.setdefault(folded, Counter())[tag] += 1
    lengths = [len(text.strip()) for text in texts]
    token_counts = [count for count, _ in tokens.count(texts)]
    over = [record.name for record, count in zip(records, token_counts) if count > tokens.LIMIT]
    return {
        "tags": [[spelled[tag].most_common(1)[0][0], count, together[tag]]
                 for tag, count in counts.most_common(MOST_TAGS)],
        "different_tags": len(counts), "with_trigger": with_trigger, "of": len(records),
        "empty": sum(not text.strip() for text in texts),
        "lengths": _histogram(lengths, LENGTH_EDGES) | {"median": median(lengths) if lengths else 0},
        "tokens": _histogram(token_counts, TOKEN_EDGES) | {"limit": tokens.LIMIT, "over": len(over), "names": over}}


def sizes(data_set: DataSet, resolution: int = 512, family: Family = "sd15", buckets_on: bool = True, batch: int = 1,
          repeats: int = 1) -> Answer:
    """The buckets at a resolution with the images that fall into each, and the length of an epoch."""
    included = _included(data_set)
    known = [record for record in included if record.pixels and record.repeats]
    step = buckets.step_for(resolution, buckets.FINEST[family])
    by_size: dict[buckets.Size, list[Record]] = {}
    chosen = [_size(record, resolution, buckets_on, step) for record in known]
    for record, size in zip(known, chosen):
        by_size.setdefault(size, []).append(record)
    order = Order(chosen, [record.repeats * repeats for record in known], global_batch=batch, seed=0, crop_variants=1,
                  flip=False, caption_variants=1, caption_dropout=0.0) if known else None
    return {
        "known": len(known), "of": len(included),
        "buckets": [_bucket(size, members, repeats) for size, members in sorted(by_size.items())],
        "images_per_epoch": sum(record.repeats * repeats for record in known),
        "steps_per_epoch": order.steps_per_epoch if order else 0,
        "ratios": _histogram([_width(record) / _height(record) for record in known], RATIO_EDGES),
        "megapixels": _histogram([record.pixels / 1e6 for record in known], PIXEL_EDGES)}


def crop(data_set: DataSet, name: str, resolution: int = 512, family: Family = "sd15",
         buckets_on: bool = True) -> Answer:
    """What of an image is seen in training with centre crops: a box in shares of its width and height."""
    [record] = data_set.index.named([name])
    if not record.pixels:
        raise UserError(f"{name}: its size is not known yet; try again in a moment")
    size = _size(record, resolution, buckets_on, buckets.step_for(resolution, buckets.FINEST[family]))
    full = buckets.cover(_width(record), _height(record), size)
    [(left, top)] = buckets.crop_offsets(_width(record), _height(record), size, crop="center", variants=1, sha256="",
                                         seed=0)
    box = [left / full[0], top / full[1], (left + size[0]) / full[0], (top + size[1]) / full[1]]
    return {"size": list(size), "box": [round(side, 5) for side in box], "cut": round(_cut(record, size), 5),
            "scale": round(full[0] / _width(record), 5)}


def rehearse(data_set: DataSet, handling: Handling, seed: int = 0, count: int = 5) -> Answer:
    """Captions of randomly drawn images as steps would train on them: with trigger word, shuffled, dropped."""
    records = _included(data_set)
    chosen = random.Random(seed).sample(records, min(count, len(records)))
    variants = handling.caption_variants if handling.shuffle_tags else 1
    shown = []
    for index, record in enumerate(chosen):
        if record.fault:
            shown.append({"name": record.name, "text": "", "dropped": False, "fault": record.fault})
            continue
        texts = training.variants(record.caption, trigger=handling.trigger, shuffle_tags=handling.shuffle_tags,
                                  keep_tags=handling.keep_tags, count=variants, seed=seed)
        order = Order([(8, 8)], [1], global_batch=1, seed=stream(seed, index, "rehearsal"), crop_variants=1,
                      flip=False, caption_variants=variants, caption_dropout=handling.caption_dropout)
        [draw] = order.batch(0)
        is_dropped = draw.caption < 0
        shown.append({"name": record.name, "text": "" if is_dropped else texts[draw.caption], "dropped": is_dropped,
                      "fault": ""})
    return {"captions": shown}


def _included(data_set: DataSet) -> list[Record]:
    data_set.index.refresh()
    return [record for record in data_set.records() if not record.excluded]


def _size(record: Record, resolution: int, buckets_on: bool, step: int) -> buckets.Size:
    return buckets.size_for(_width(record), _height(record), resolution, buckets=buckets_on, step=step)


def _bucket(size: buckets.Size, members: Sequence[Record], repeats: int) -> Answer:
    shares = [_cut(record, size) for record in members]
    enlarged = sum(record.pixels < size[0] * size[1] for record in members)
    return {"size": list(size), "images": len(members), "repeated": sum(r.repeats * repeats for r in members),
            "crop": round(sum(shares) / len(shares), 4), "most_crop": round(max(shares), 4), "enlarged": enlarged,
            "names": [record.name for record in members]}


def _cut(record: Record, size: buckets.Size) -> float:
    """The share of an image that a crop leaves out."""
    full = buckets.cover(_width(record), _height(record), size)
    return 1 - size[0] * size[1] / (full[0] * full[1])


def _width(record: Record) -> int:
    return record.facts.width if record.facts else 0


def _height(record: Record) -> int:
    return record.facts.height if record.facts else 0


def _histogram(values: Sequence[float], edges: Sequence[float]) -> Answer:
    """How many values lie in each [edge, next edge); empty ends are left out."""
    counts = [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:])]
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return {"edges": [], "counts": []}
    return {"edges": list(edges[filled[0]:filled[-1] + 2]), "counts": counts[filled[0]:filled[-1] + 1]}
