"""Buckets: sizes keep their promises for any image, and crops lie inside it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.buckets import cover, crop_offsets, size_for, step_for

SIDE = st.integers(1, 20_000)


@given(SIDE, SIDE, st.integers(8, 130).map(lambda n: 8 * n), st.sampled_from([8, 16]), st.booleans())
def test_sizes_are_multiples_of_the_step_within_the_area(width, height, resolution, finest, buckets):
    step = step_for(resolution, finest)
    size = size_for(width, height, resolution, buckets=buckets, step=step)
    assert step % finest == 0 and step <= max(finest, resolution // 4)
    assert size[0] % step == size[1] % step == 0 and min(size) > 0
    assert size[0] * size[1] <= resolution**2
    assert buckets or size[0] == size[1]
    assert size_for(height, width, resolution, buckets=buckets, step=step) in (size, size[::-1])


@given(st.integers(8, 130).map(lambda n: 8 * n))
def test_squares_stay_square_at_any_resolution(resolution):
    width, height = size_for(700, 700, resolution, buckets=True, step=step_for(resolution, 16))
    assert width == height > 0.7 * resolution


@pytest.mark.parametrize(("image", "size"), [
    ((3000, 2000), (640, 384)), ((2000, 3000), (384, 640)), ((512, 512), (512, 512)), ((1920, 1080), (640, 384)),
    ((100, 100), (512, 512)), ((9000, 100), (1024, 256))])
def test_the_nearest_shape_is_chosen(image, size):
    assert size_for(*image, 512, buckets=True, step=64) == size


@given(SIDE, SIDE)
def test_little_is_cropped_from_common_shapes(width, height):
    if 1 / 3 <= width / height <= 3:
        size = size_for(width, height, 1024, buckets=True, step=64)
        assert abs(math.log(size[0] / size[1] / (width / height))) < 0.12


@given(SIDE, SIDE, st.sampled_from([(512, 512), (640, 384), (64, 256)]), st.sampled_from(["center", "random"]),
       st.integers(1, 8))
def test_crops_lie_inside_the_covering_image(width, height, size, crop, variants):
    full = cover(width, height, size)
    assert full[0] >= size[0] and full[1] >= size[1]
    assert full[0] == size[0] or full[1] == size[1]
    offsets = crop_offsets(width, height, size, crop=crop, variants=variants, sha256="ab", seed=1)
    assert len(offsets) == variants
    assert all(0 <= left <= full[0] - size[0] and 0 <= top <= full[1] - size[1] for left, top in offsets)


def test_the_centre_is_the_centre():
    assert crop_offsets(1000, 500, (256, 256), crop="center", variants=2, sha256="", seed=0) == [(128, 0)] * 2


def test_random_crops_are_distinct_and_a_function_of_content_and_seed():
    def offsets(sha, seed):
        return crop_offsets(1000, 500, (256, 256), crop="random", variants=6, sha256=sha, seed=seed)

    assert len(set(offsets("a", 0))) == 6
    assert offsets("a", 0) == offsets("a", 0) != offsets("b", 0)
    assert offsets("a", 0) != offsets("a", 1)


def test_an_image_without_room_has_one_crop():
    assert crop_offsets(512, 512, (256, 256), crop="random", variants=3, sha256="a", seed=0) == [(0, 0)] * 3
