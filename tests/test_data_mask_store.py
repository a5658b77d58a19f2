"""Masks fall on the very places of the latents that their images' pixels fell on."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from trainer.data import buckets, dataset
from trainer.data.cache import Cache
from trainer.data.folders import mask_of
from trainer.data.mask_store import MaskStore
from trainer.data.order import Draw
from trainer.data.store import LatentStore
from trainer.errors import UserError


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """A stand-in for a VAE: means of 8 × 8 pixels.  # b 3 h w -> b 3 h/8 w/8"""
    return F.avg_pool2d(pixels, 8)


def picture(folder: Path, name: str = "a.png", size: tuple[int, int] = (200, 120), scale: int = 1) -> Path:
    """Black with a white spot, and a mask that is the same: then mask and latents must agree wherever they are cut."""
    folder.mkdir(exist_ok=True)
    for path, by in ((folder / name, 1), (mask_of(folder / name), scale)):
        image = Image.new("RGB", (size[0] * by, size[1] * by))
        ImageDraw.Draw(image).ellipse([120 * by, 20 * by, 180 * by, 90 * by], fill="white")
        image.save(path)
    return folder / name


def stores(folder: Path, cache: Path, masks: str = "file", crop: str = "random") -> tuple[LatentStore, MaskStore]:
    items = dataset.scan([folder], masks=masks).items
    sizes = [(64, 64)] * len(items)
    offsets = [buckets.crop_offsets(item.width, item.height, (64, 64), crop=crop, variants=3, sha256=item.sha256,
                                    seed=1) for item in items]
    latents = LatentStore(items, sizes, offsets, True, Cache(cache), "vae", torch.float32)
    latents.fill(encode, 4, lambda done, of: None, lambda: False, lambda file, reason: None)
    made = MaskStore(latents)
    made.fill(lambda done, of: None, lambda: None)
    return latents, made


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(("crop", "flip"), [(0, False), (1, False), (2, False), (0, True), (2, True)])
def test_a_mask_is_cut_and_mirrored_as_its_image(tmp_path, crop, flip, scale):
    picture(tmp_path / "images", scale=scale)
    latents, masks = stores(tmp_path / "images", tmp_path / "cache")
    draws = [Draw(0, 0, crop, flip, 0)]
    shown = (latents.latents(draws, "cpu").mean(1, keepdim=True) + 1) / 2
    torch.testing.assert_close(masks.masks(draws, "cpu"), shown, atol=0.08, rtol=0)  # Lanczos against areas
    assert 0.05 < shown.mean() < 0.9


def test_the_alpha_channel_is_a_mask_and_a_file_comes_before_it(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.save(folder / "a.png")
    halves = torch.cat([torch.ones(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)], dim=-1)
    draws = [Draw(0, 0, 0, False, 0)]
    assert torch.equal(stores(folder, tmp_path / "1", "alpha")[1].masks(draws, "cpu"), halves)
    assert torch.equal(stores(folder, tmp_path / "1", "auto")[1].masks(draws, "cpu"), halves)
    assert stores(folder, tmp_path / "1", "file")[1].masks(draws, "cpu") is None
    Image.new("L", (64, 64), 255).save(mask_of(folder / "a.png"))
    for masks, expected in (("auto", torch.ones(1, 1, 8, 8)), ("file", torch.ones(1, 1, 8, 8)), ("alpha", halves)):
        assert torch.equal(stores(folder, tmp_path / "1", masks)[1].masks(draws, "cpu"), expected)
    assert stores(folder, tmp_path / "1", "off")[1].masks(draws, "cpu") is None


def test_images_without_a_mask_count_whole_beside_those_that_have_one(tmp_path):
    picture(tmp_path / "images")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "b.png")
    masks = stores(tmp_path / "images", tmp_path / "cache")[1]
    both = masks.masks([Draw(0, 0, 0, False, 0), Draw(1, 1, 0, False, 0)], "cpu")
    assert both.shape == (2, 1, 8, 8) and both[1].eq(1).all() and not both[0].eq(1).all()
    assert masks.masks([Draw(1, 1, 0, False, 0)], "cpu") is None


def test_a_changed_mask_is_made_again_and_the_image_is_not(tmp_path):
    image = picture(tmp_path / "images")
    latents, masks = stores(tmp_path / "images", tmp_path / "cache")
    before = masks.masks([Draw(0, 0, 0, False, 0)], "cpu")
    entries = set((tmp_path / "cache").rglob("*.safetensors"))
    stores(tmp_path / "images", tmp_path / "cache")
    assert set((tmp_path / "cache").rglob("*.safetensors")) == entries and len(entries) == 3 + 6  # nothing new
    Image.new("L", (200, 120), 255).save(mask_of(image))
    latents, masks = stores(tmp_path / "images", tmp_path / "cache")
    assert masks.masks([Draw(0, 0, 0, False, 0)], "cpu").eq(1).all() and not before.eq(1).all()
    new = set((tmp_path / "cache").rglob("*.safetensors")) - entries
    assert len(new) == 3 and not latents.missing()


def test_a_mask_that_changes_or_breaks_after_the_scan_ends_in_plain_words(tmp_path):
    image = picture(tmp_path / "images")
    items = dataset.scan([tmp_path / "images"], masks="file").items
    Image.new("L", (200, 120)).save(mask_of(image))
    with pytest.raises(UserError, match="a-masklabel.png: the mask cannot be used: changed since"):
        dataset.mask_image(items[0], (64, 64))


@pytest.mark.parametrize(("content", "message"), [
    (b"no picture", "a-masklabel.png: the mask cannot be used: not an image"),
    (None, "a-masklabel.png: the mask has 120 × 200 pixels, which is another shape than its image"),
])
def test_masks_that_cannot_be_used_are_refused_all_at_once(tmp_path, content, message):
    for name in ("a.png", "b.png"):
        path = mask_of(picture(tmp_path / "images", name))
        Image.new("L", (120, 200)).save(path)
        if content:
            path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        dataset.scan([tmp_path / "images"], masks="file")
    assert "b-masklabel.png" in str(error.value)
    assert len(dataset.scan([tmp_path / "images"]).items) == 2  # masks are off: nobody looks at them


def test_a_mask_is_turned_as_its_exif_says_and_transparent_parts_are_black(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(folder / "a.jpg", exif=exif)  # upright it is 32 × 64
    mask = Image.new("RGBA", (32, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 32))
    mask.save(mask_of(folder / "a.jpg"))
    item, = dataset.scan([folder], masks="file").items
    grey = dataset.mask_image(item, (32, 64))
    assert grey.size == (32, 64) and grey.getpixel((5, 5)) == 255 and grey.getpixel((5, 60)) == 0
