"""The overview tells what training will see: the same buckets, crops, counts, tokens and captions."""

import random
from dataclasses import replace

import pytest
from pydantic import ValidationError

from app.datasets import overview, tokens
from app.datasets.overview import Handling
from tests.data_sets import draw, wait_until_known
from trainer import captions
from trainer.data import buckets
from trainer.data.dataset import scan
from trainer.data.order import Order
from trainer.families import clip_text, get


def test_tags_are_counted_alone_and_with_the_trigger(cats):
    cats.exclude(["5_more/e.jpg"])
    told = overview.captions(cats, trigger="DOG")
    assert told["tags"][:2] == [["red", 2, 1], ["cat", 2, 0]] or told["tags"][:2] == [["cat", 2, 0], ["red", 2, 1]]
    assert (told["with_trigger"], told["of"], told["empty"], told["different_tags"]) == (1, 4, 1, 5)
    assert sum(told["lengths"]["counts"]) == sum(told["tokens"]["counts"]) == 4
    assert told["lengths"]["median"] == 8.5


def test_captions_beyond_the_limit_are_named(cats):
    (cats.root / "b.txt").write_bytes(b"word " * 100)
    cats.index.refresh(at_once=True)
    told = overview.captions(cats)["tokens"]
    assert (told["over"], told["names"], told["limit"]) == (1, ["b.png"], 77)


TEXTS = ["", "a photo of a cat", "word " * 100, " Ünïcode 日本語 it's 42!! \n new line, tag_with (weights:1.2)",
         "a" * 400, "x, " * 75, "\U0001f600 emoji"]


def test_tokens_are_those_of_the_text_encoder():
    theirs = clip_text.load_tokenizer(None)
    assert [count for count, _ in tokens.count(TEXTS)] == [len(theirs(text).input_ids) for text in TEXTS]


def test_the_limit_falls_where_the_text_before_it_just_fits():
    for text in ("  word" * 100, "red cat, " * 60, "日本語 " * 40):
        [(count, cut)] = tokens.count([text])
        assert count > 77 and 0 < cut < len(text)
        assert tokens.count([text[:cut]])[0][0] <= 77 < tokens.count([text[:cut + 12]])[0][0]
    assert tokens.count(["word " * 75]) == [(77, None)]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux1", "flux2"])
@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768, 1024])
def test_each_familys_grid_is_its_own(family, resolution):
    assert buckets.step_for(resolution, buckets.FINEST[family]) == get(family).bucket_step(resolution)


def test_images_fall_into_the_buckets_that_training_gives_them(cats):
    for seed, size in enumerate([(900, 600), (600, 900), (300, 1200), (1000, 1000)]):
        draw(cats.root / f"{seed}.png", size, seed=70 + seed)
    cats.index.refresh(at_once=True)
    cats.exclude(["a.png"])
    wait_until_known(cats)
    told = overview.sizes(cats, resolution=512, family="sd15", batch=2, repeats=3)
    items = scan([cats.root], repeats=3).items
    sizes = [buckets.size_for(item.width, item.height, 512, buckets=True, step=64) for item in items]
    order = Order(sizes, [item.repeats for item in items], global_batch=2, seed=1, crop_variants=1, flip=False,
                  caption_variants=1, caption_dropout=0.0)
    assert {tuple(bucket["size"]): bucket["repeated"] for bucket in told["buckets"]} == {
        size: len(members) for size, members in order.buckets.items()}
    assert told["steps_per_epoch"] == order.steps_per_epoch and told["images_per_epoch"] == sum(
        item.repeats for item in items)
    assert (told["known"], told["of"]) == (8, 8) and sum(told["ratios"]["counts"]) == 8
    square = overview.sizes(cats, resolution=512, buckets_on=False)["buckets"]
    assert [bucket["size"] for bucket in square] == [[512, 512]] and square[0]["enlarged"] == 4


def test_all_images_of_a_large_bucket_and_all_long_captions_are_named(cats):
    wait_until_known(cats)
    [some] = [record for record in cats.records() if record.name == "c.png"]
    many = {f"{i}.png": replace(some, name=f"{i}.png", caption="word " * 100) for i in range(3000)}
    cats.index.refresh = lambda at_once=False: None  # 3000 images without as many files
    cats.index.records = many
    [bucket] = overview.sizes(cats)["buckets"]
    assert bucket["images"] == 3000 and bucket["names"] == list(many)
    assert overview.captions(cats)["tokens"]["names"] == list(many)


def test_a_crop_is_the_one_that_training_makes(cats):
    draw(cats.root / "wide.png", (1000, 200), seed=80)
    cats.index.refresh(at_once=True)
    wait_until_known(cats)
    told = overview.crop(cats, "wide.png", 256, "sd15", True)
    size = tuple(told["size"])
    full = buckets.cover(1000, 200, size)
    [(left, top)] = buckets.crop_offsets(1000, 200, size, crop="center", variants=1, sha256="", seed=0)
    box = [left / full[0], top / full[1], (left + size[0]) / full[0], (top + size[1]) / full[1]]
    assert told["box"] == pytest.approx(box, abs=1e-4)
    assert told["cut"] == pytest.approx(1 - (box[2] - box[0]) * (box[3] - box[1]), abs=1e-4) and told["cut"] > 0.1


def test_rehearsed_captions_are_made_by_the_code_that_training_uses(cats):
    handling = Handling(trigger="sks", shuffle_tags=True, keep_tags=1, caption_variants=4)
    shown = overview.rehearse(cats, handling, seed=3)["captions"]
    assert len(shown) == 5 and len({caption["name"] for caption in shown}) == 5
    for caption in shown:
        text = captions.read((cats.root / caption["name"]).with_suffix(".txt"))
        assert caption["text"] in captions.variants(text, trigger="sks", shuffle_tags=True, keep_tags=1, count=4,
                                                    seed=3)
        assert caption["text"].startswith("sks")
    assert overview.rehearse(cats, handling, seed=3)["captions"] == shown
    assert overview.rehearse(cats, handling, seed=4)["captions"] != shown


def test_dropped_captions_are_shown_as_such_and_as_often_as_asked(cats):
    rng, dropped, total = random.Random(0), 0, 0
    for _ in range(80):
        shown = overview.rehearse(cats, Handling(caption_dropout=0.3), seed=rng.randrange(10**6))["captions"]
        dropped += sum(caption["dropped"] for caption in shown)
        assert all(caption["text"] == "" for caption in shown if caption["dropped"])
        total += len(shown)
    assert 0.2 < dropped / total < 0.4


def test_settings_of_captions_are_checked():
    for wrong in ({"caption_dropout": 2.0}, {"keep_tags": -1}, {"caption_variants": 0}, {"more": 1}):
        with pytest.raises(ValidationError):
            Handling(**wrong)
