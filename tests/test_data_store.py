"""Stores: encoded once, whatever happens in between, and never stale."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.pixels import load_pixels
from trainer.data import store
from trainer.data.buckets import crop_offsets
from trainer.data.cache import Cache
from trainer.data.dataset import scan
from trainer.data.order import Draw
from trainer.data.store import LatentStore, TextStore
from trainer.errors import UserError

SIZES = [(32, 32), (48, 16), (32, 32), (48, 16), (32, 32)]


@pytest.fixture
def items(tmp_path):
    for i in range(5):
        image = Image.new("RGB", (60, 40), (40 * i, 10, 200))
        image.paste((255, 255, 255), (0, 0, 20, 20))
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{i}.png")
    return scan([tmp_path / "images"]).items


class Encoder:
    """Averages 8 × 8 pixels; like a real one its last bits depend on what else is in the batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, pixels):
        self.batches.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 8) + 1e-4 * pixels.mean()


def latent_store(items, root, variants=2, flips=True, model_id="vae", dtype=torch.float32, **options):
    offsets = [crop_offsets(item.width, item.height, size, crop="random", variants=variants, sha256=item.sha256, seed=0)
               for item, size in zip(items, SIZES)]
    return LatentStore(items, SIZES[:len(items)], offsets, flips, Cache(root), model_id, dtype, **options)


def fill(latents, encode=None, batch_size=4, progress=lambda done, total: None, should_stop=lambda: False,
         skipped=None):
    return latents.fill(encode or Encoder(), batch_size, progress, should_stop,
                        lambda file, reason: (skipped if skipped is not None else []).append((file, reason)))


def everything(latents):
    return [latents.latents([Draw(i, 0, crop, flip, 0)], "cpu")
            for i in range(len(latents.items)) for crop in (0, 1) for flip in (False, True)]


def test_latents_are_those_of_the_crop_and_of_its_mirror(items, tmp_path):
    latents = latent_store(items, tmp_path / "cache")
    assert fill(latents, encode=lambda pixels: torch.nn.functional.avg_pool2d(pixels, 8)) and not latents.missing()
    batch = latents.latents([Draw(0, 0, 1, False, 0), Draw(2, 1, 0, True, 0)], "cpu")
    for latent, (item, crop, flip) in zip(batch, [(0, 1, False), (2, 0, True)]):
        pixels = load_pixels(items[item], SIZES[item], latents.offsets[item][crop], flip)
        assert torch.equal(latent, torch.nn.functional.avg_pool2d(pixels[None], 8)[0])


def test_a_second_fill_encodes_nothing_and_anything_else_is_another_entry(items, tmp_path):
    fill(latent_store(items, tmp_path / "cache"))
    encoder = Encoder()
    fill(latent_store(items, tmp_path / "cache"), encoder)
    assert encoder.batches == []
    for changed in ({"model_id": "other"}, {"dtype": torch.float16}, {"variants": 3}):
        assert latent_store(items, tmp_path / "cache", **changed).missing()


def test_an_edited_image_is_encoded_again(items, tmp_path):
    fill(latent_store(items, tmp_path / "cache"))
    Image.new("RGB", (60, 40)).save(items[0].path)
    again = latent_store(scan([tmp_path / "images"]).items, tmp_path / "cache")
    assert {job.item for job in again.missing()} == {0}


@pytest.mark.parametrize("stop_after", [0, 1, 2, 4])
def test_a_fill_that_was_stopped_or_damaged_goes_on_to_the_same_bits(items, tmp_path, stop_after):
    unbroken, broken = latent_store(items, tmp_path / "one"), latent_store(items, tmp_path / "two")
    fill(unbroken)
    checks = iter(range(100))
    assert not fill(broken, should_stop=lambda: next(checks) >= stop_after)
    for path in sorted((tmp_path / "two").rglob("*.safetensors"))[::3]:
        path.write_bytes(path.read_bytes()[:50])  # torn
    told = []
    assert fill(broken, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1] == (20, 20)
    assert all(torch.equal(a, b) for a, b in zip(everything(unbroken), everything(broken)))


def test_an_entry_once_made_is_never_written_again(items, tmp_path):
    fill(latent_store(items, tmp_path / "cache"))
    lost, *kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    before = [path.stat().st_ino for path in kept]
    lost.unlink()
    fill(latent_store(items, tmp_path / "cache"))
    assert lost.exists() and [path.stat().st_ino for path in kept] == before


def test_batches_are_of_one_size_and_equal_images_are_encoded_once(items, tmp_path):
    (tmp_path / "images" / "twin.png").write_bytes(items[0].path.read_bytes())
    twins = scan([tmp_path / "images"]).items
    latents = latent_store(twins[:5], tmp_path / "cache", variants=1, flips=False)
    latents.items, latents.sizes, latents.offsets = twins, [*SIZES, SIZES[0]], [*latents.offsets, latents.offsets[0]]
    encoder = Encoder()
    fill(latents, encoder, batch_size=2)
    assert sorted(encoder.batches) == [1, 2, 2]
    assert latents.latents([Draw(5, 0, 0, False, 0)], "cpu").shape == (1, 3, 4, 4)


def test_an_image_that_breaks_while_decoding_is_named_and_left_out(items, tmp_path):
    Path(items[1].path).write_bytes(b"gone bad")
    latents, skipped = latent_store(items, tmp_path / "cache"), []
    assert fill(latents, skipped=skipped)
    assert [(file, "changed since" in reason) for file, reason in skipped] == [(str(items[1].path), True)]
    assert latents.repeats() == [1, 0, 1, 1, 1]
    for item in items:
        item.path.write_bytes(b"gone bad")
    with pytest.raises(UserError, match="none of the images can be decoded"):
        fill(latent_store(items, tmp_path / "other"))


def test_what_processes_decode_has_the_same_bits_and_the_same_faults(items, tmp_path, monkeypatch):
    Path(items[3].path).write_bytes(b"gone bad")
    here, apart, skipped = latent_store(items, tmp_path / "one"), latent_store(items, tmp_path / "two"), []
    fill(here, skipped=skipped)
    started = []
    monkeypatch.setattr(store, "processes_for", lambda files, sharing: started.append(len(files)) or 2)
    fill(apart, skipped=skipped)
    assert started == [5] and skipped[0] == skipped[1] and len(skipped) == 2 and apart.readable() == [0, 1, 2, 4]
    for i in apart.readable():
        draws = [Draw(i, 0, crop, flip, 0) for crop in (0, 1) for flip in (False, True)]
        assert torch.equal(here.latents(draws, "cpu"), apart.latents(draws, "cpu"))


def test_a_store_without_images_has_nothing_to_fill(tmp_path):
    assert fill(latent_store([], tmp_path / "cache"))


@pytest.mark.parametrize("memory", [0, 500, 1 << 20])
def test_memory_is_kept_within_its_limit_and_changes_nothing(items, tmp_path, memory):
    fill(latent_store(items, tmp_path / "cache"))
    latents = latent_store(items, tmp_path / "cache", memory=memory)
    first = everything(latents)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(latents)))
    kept = latents._shelf._kept.values()
    assert sum(entry["latents"].nbytes for entry in kept) <= memory and bool(kept) == (memory > 200)


def test_a_cache_emptied_while_training_is_a_plain_message(items, tmp_path):
    latents = latent_store(items, tmp_path / "cache")
    with pytest.raises(UserError, match="lost an entry while training"):
        latents.latents([Draw(0, 0, 0, False, 0)], "cpu")


def chunks(text):
    return 1 + len(text) // 10


def encode_text(texts):
    """Three tokens a chunk of ten letters; all as long as the longest, as a model's batch must be."""
    longest = max(chunks(text) for text in texts)
    embeds = torch.zeros(len(texts), 3 * longest, 2)
    for row, text in zip(embeds, texts):
        row += torch.tensor([len(text), longest])
    return {"prompt_embeds": embeds, "pooled": embeds[:, 0], "ids": torch.ones(len(texts), 4, dtype=torch.int64)}


def filled_texts(root, texts, **options):
    texts = TextStore(texts, Cache(root), "clip", torch.float32)
    assert texts.fill(encode_text, 2, lambda done, total: None, lambda: False, chunks, **options)
    return texts


def test_embeddings_depend_on_their_text_alone_and_are_padded_by_the_empty_prompt(tmp_path):
    texts = filled_texts(tmp_path, ["a cat", "a" * 25, "a dog", "b" * 12])
    found = texts.embeds(["a" * 25, "a cat", ""])
    assert found["prompt_embeds"].shape == (3, 9, 2) and found["pooled"].shape == (3, 2)
    assert found["ids"].dtype == torch.int64
    short, empty = found["prompt_embeds"][1], found["prompt_embeds"][2]
    assert torch.equal(short[:3], torch.tensor([5.0, 1.0]).expand(3, 2))
    assert torch.equal(short[3:], torch.tensor([0.0, 1.0]).expand(6, 2)) and torch.equal(empty[:6], short[3:])
    assert texts.embeds(["a cat", "a dog"])["prompt_embeds"].shape == (2, 3, 2)


def test_the_empty_prompt_is_always_there_and_texts_are_encoded_once(tmp_path):
    texts = filled_texts(tmp_path, ["a cat", "a cat"])
    assert texts.texts == ["", "a cat"] and not texts.missing()
    assert TextStore([], Cache(tmp_path), "clip", torch.float32).missing() == []
    assert TextStore(["a dog"], Cache(tmp_path), "clip", torch.float32).missing() == ["a dog"]
    assert TextStore([], Cache(tmp_path), "other", torch.float32).missing() == [""]


def test_a_text_fill_can_be_stopped_and_says_how_far_it_is(tmp_path):
    texts, told = TextStore("abcde", Cache(tmp_path), "clip", torch.float32), []
    checks = iter([False, True])
    assert not texts.fill(encode_text, 2, lambda *now: told.append(now), lambda: next(checks))
    assert told == [(0, 6), (2, 6)] and len(texts.missing()) == 4


def test_lengths_that_the_empty_prompt_cannot_fill_are_refused():
    with pytest.raises(ValueError, match="differ by"):
        store._pad([torch.zeros(5, 2), torch.zeros(4, 2)], torch.zeros(3, 2))
