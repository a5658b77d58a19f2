"""Decoding: every kind of image that people keep gives its true colours, upright; a broken one gives a reason."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from trainer.data import images
from trainer.data.images import ImageError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(data, x=0, y=0):
    return images.decode(data).getpixel((x, y))


def near(found, expected, tolerance=4):
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


def marked():
    """40 × 24, blue, with a red square in the top left corner."""
    image = Image.new("RGB", (40, 24), BLUE)
    image.paste(RED, (0, 0, 8, 8))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "corner"), [
    (1, (2, 2)), (2, (37, 2)), (3, (37, 21)), (4, (2, 21)), (5, (2, 2)), (6, (21, 2)), (7, (21, 37)), (8, (2, 37))])
def test_the_image_is_turned_as_its_exif_says(kind, orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(marked(), kind, exif=exif, **options)
    size = (40, 24) if orientation < 5 else (24, 40)
    assert images.inspect(data) == size and images.decode(data).size == size
    assert near(pixel(data, *corner), RED, 30)
    assert near(pixel(data, size[0] // 2, size[1] // 2), BLUE, 30)


def test_a_png_with_its_exif_behind_the_pixels_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(marked(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start:start + 4], "big")
    tail = data.index(b"IEND") - 4
    data = data[:start] + data[end:tail] + data[start:end] + data[tail:]
    assert images.inspect(data) == (24, 40) and images.decode(data).size == (24, 40)


def test_transparency_lies_over_white():
    assert pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert near(pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG")), (255, 127, 127), 1)
    assert near(pixel(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG")), (127, 127, 127), 1)
    assert pixel(encoded(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)) == (255, 255, 255)


def test_palettes_keep_colour_and_transparency():
    image = marked().quantize(4)
    assert near(pixel(encoded(image, "PNG"), 2, 2), RED) and near(pixel(encoded(image, "GIF"), 30, 20), BLUE)
    index = image.getpixel((2, 2))
    assert pixel(encoded(image, "PNG", transparency=index), 2, 2) == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (0x4080, 64), (0x8080, 128), (0xFFFF, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind, value, expected):
    image = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert near(pixel(encoded(image, kind)), (expected,) * 3, 1)


def test_grey_one_bit_and_float_images_become_rgb():
    assert pixel(encoded(Image.new("L", (4, 4), 77), "PNG")) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)
    assert near(pixel(encoded(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF")), (128,) * 3, 1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(kind):
    options = {"quality": 95} if kind == "JPEG" else {}
    assert near(pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind, **options)), RED, 6)
    assert near(pixel(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), kind, **options)), (255, 255, 255), 6)


def test_colours_of_another_space_are_converted():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for profile in (srgb, lab, b"no profile at all"):  # its own, one that does not fit, a broken one
        assert pixel(encoded(image, "PNG", icc_profile=profile)) == (200, 100, 50)
    assert near(pixel(encoded(image, "PNG", icc_profile=_swapped(srgb))), (50, 100, 200), 3)


def _swapped(srgb):
    """An RGB profile with red and blue exchanged, under a name of its own."""
    data = bytearray(srgb)
    tags = {bytes(data[i:i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    data[red + 4:red + 12], data[blue + 4:blue + 12] = data[blue + 4:blue + 12], data[red + 4:red + 12]
    return bytes(data).replace(b"sRGB", b"BRGs").replace("sRGB".encode("utf-16-be"), "BRGs".encode("utf-16-be"))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    assert near(pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), RED)


def noise(kind):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


@pytest.mark.parametrize("data", [
    b"", b"\x89PNG\r\n\x1a\n", b"not an image", noise("PNG")[:3000], noise("JPEG")[:3000], noise("WEBP")[:3000]])
def test_broken_bytes_are_found_by_a_look_and_by_decoding(data):
    for read in (images.inspect, images.decode):
        with pytest.raises(ImageError, match="empty|broken"):
            read(data)


def test_a_photograph_cut_short_is_found_by_a_look_in_spite_of_the_end_of_its_thumbnail():
    exif = Image.Exif()
    exif[0x927C] = b"thumbnail\xff\xd9"
    pixels = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    assert len(data) > 150_000 and images.inspect(data) == (400, 400)
    with pytest.raises(ImageError, match="broken"):
        images.inspect(data[:120_000])


def test_damaged_pixels_of_a_png_are_found_by_a_look():
    data = bytearray(noise("PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="broken"):
        images.inspect(bytes(data))


def test_enormous_images_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 900)
    with pytest.raises(ImageError, match="40 × 24 pixels are more than"):
        images.inspect(encoded(marked(), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own refusal
    with pytest.raises(ImageError, match="pixels that are read; make it smaller"):
        images.decode(encoded(marked(), "PNG"))


# Masks


@pytest.mark.parametrize(("image", "grey"), [
    (Image.new("L", (4, 2), 200), 200),
    (Image.new("1", (4, 2), 1), 255),
    (Image.new("RGB", (4, 2), (90, 90, 90)), 90),
    (Image.new("I;16", (4, 2), 32896), 128),
    (Image.new("RGBA", (4, 2), (255, 255, 255, 0)), 0),
    (Image.new("RGBA", (4, 2), (255, 255, 255, 128)), 128),
    (Image.new("LA", (4, 2), (255, 255)), 255),
])
def test_masks_of_any_mode_become_grey_over_black(image, grey):
    decoded = images.decode_mask(encoded(image, "PNG"))
    assert decoded.mode == "L" and decoded.size == (4, 2) and abs(decoded.getpixel((0, 0)) - grey) <= 1


def test_the_alpha_channel_of_any_mode_is_found():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, "PNG", transparency=1)
    assert images.has_alpha(data) and np.asarray(images.decode_alpha(data)).tolist() == [[255, 0]]
    grey = images.decode_alpha(encoded(Image.new("LA", (1, 1), (9, 77)), "PNG"))
    assert grey.mode == "L" and grey.getpixel((0, 0)) == 77
    assert not images.has_alpha(encoded(Image.new("RGB", (2, 2)), "PNG"))


def test_a_broken_mask_is_told_in_plain_words():
    with pytest.raises(ImageError, match="not an image"):
        images.decode_mask(b"no")
