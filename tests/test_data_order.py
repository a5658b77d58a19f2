"""Data order: a pure function of seed and step that drops no image, on any number of processes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Order, share, stream
from trainer.errors import UserError

SIZES = [(512, 512), (640, 384), (384, 640)]
ITEMS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 4)), min_size=1, max_size=20)


def order(items, global_batch=4, seed=0, **options):
    options = {"crop_variants": 4, "flip": True, "caption_variants": 8, "caption_dropout": 0.1} | options
    return Order([size for size, _ in items], [count for _, count in items], global_batch=global_batch, seed=seed,
                 **options)


@given(ITEMS, st.integers(1, 7), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_shows_every_image_as_often_as_it_is_repeated(items, global_batch, seed, epoch):
    plan = order(items, global_batch, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    shown = Counter(draw.item for step in steps for draw in plan.batch(step))
    assert all(shown[i] >= count for i, (_, count) in enumerate(items))
    assert sum(shown.values()) - sum(count for _, count in items) < global_batch * len({size for size, _ in items})


@given(ITEMS, st.integers(1, 7), st.integers(0, 30))
def test_a_batch_is_full_and_of_one_size(items, global_batch, step):
    batch = order(items, global_batch).batch(step)
    assert len(batch) == global_batch and len({items[draw.item][0] for draw in batch}) == 1
    assert [draw.index for draw in batch] == list(range(step * global_batch, (step + 1) * global_batch))


@given(ITEMS, st.lists(st.integers(0, 60), max_size=8))
def test_a_batch_does_not_depend_on_what_was_asked_before(items, steps):
    plan = order(items)
    assert [plan.batch(step) for step in steps] == [order(items).batch(step) for step in steps]


@given(ITEMS, st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (4, 2)]), st.integers(0, 20))
def test_processes_and_micro_batches_share_the_same_global_batch(items, layout, step):
    processes, grad_accum = layout
    batch = order(items, global_batch=8).batch(step)
    parts = [share(batch, rank, processes, micro, grad_accum)
             for micro in range(grad_accum) for rank in range(processes)]
    assert [draw for part in parts for draw in part] == batch and len({len(part) for part in parts}) == 1


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="cannot be shared by 3 processes × 1"):
        share(order([(SIZES[0], 1)]).batch(0), 0, 3, 0, 1)


def test_epochs_and_seeds_differ():
    items = [(SIZES[0], 1)] * 16
    epochs = [tuple(d.item for step in range(4 * e, 4 * e + 4) for d in order(items).batch(step)) for e in range(3)]
    assert len(set(epochs)) == 3
    assert order(items).batch(0) != order(items, seed=1).batch(0)


def test_crops_flips_captions_and_dropout_come_in_their_shares():
    plan = order([(SIZES[0], 1)] * 10, global_batch=10, caption_dropout=0.25)
    draws = [draw for step in range(400) for draw in plan.batch(step)]
    assert abs(sum(draw.caption == -1 for draw in draws) / 4000 - 0.25) < 0.03
    assert abs(sum(draw.flip for draw in draws) / 4000 - 0.5) < 0.03
    assert all(abs(Counter(d.crop for d in draws)[crop] / 4000 - 0.25) < 0.03 for crop in range(4))
    assert {draw.caption for draw in draws} == {-1, *range(8)}


def test_what_is_off_stays_off():
    plan = order([(SIZES[0], 3)], flip=False, crop_variants=1, caption_variants=1, caption_dropout=0.0)
    assert {(d.crop, d.flip, d.caption) for step in range(20) for d in plan.batch(step)} == {(0, False, 0)}


def test_an_image_with_no_repeats_is_left_out_and_none_left_is_said():
    plan = order([(SIZES[0], 0), (SIZES[0], 1)])
    assert {draw.item for step in range(5) for draw in plan.batch(step)} == {1}
    with pytest.raises(UserError, match="no image is left"):
        order([(SIZES[0], 0)])


def test_streams_differ_by_seed_index_and_purpose_and_never_change():
    found = [stream(s, i, p) for s in (0, 1) for i in (0, 1, 10) for p in ("noise", "timestep")]
    assert len(set(found)) == 12 and all(0 <= value < 2**63 for value in found)
    assert stream(1, 10, "noise") == stream(1, 10, "noise") != stream(11, 0, "noise")
    assert stream(0, 0, "noise") == 6325401088541685632  # a run of an older version resumes in the same order


# Regularisation images

PRIOR = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 3)), min_size=1, max_size=12)


def with_prior(items, prior, share=0.5, **options):
    return order(items + prior, prior=[False] * len(items) + [True] * len(prior), prior_share=share, **options)


@given(ITEMS, PRIOR, st.integers(1, 5), st.integers(0, 40))
def test_with_regularisation_batches_are_still_full_of_one_size_and_without_state(items, prior, global_batch, step):
    plan = with_prior(items, prior, global_batch=global_batch)
    batch = plan.batch(step)
    assert len(batch) == global_batch and len({(items + prior)[draw.item][0] for draw in batch}) == 1
    assert with_prior(items, prior, global_batch=global_batch).batch(step) == batch


@given(ITEMS, PRIOR, st.integers(0, 3))
def test_with_regularisation_an_epoch_still_shows_every_training_image(items, prior, epoch):
    plan = with_prior(items, prior)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    shown = Counter(draw.item for step in steps for draw in plan.batch(step))
    assert all(shown[i] >= count for i, (_, count) in enumerate(items))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 20), (0.2, 5), (0.8, 80)])
def test_regularisation_images_make_up_their_share_and_take_turns(share, expected):
    plan = with_prior([(SIZES[0], 1)] * 20, [(SIZES[0], 1)] * 30, share, global_batch=1)
    assert plan.steps_per_epoch == 20 + expected
    shown = Counter(plan.batch(step)[0].item for step in range(60 * plan.steps_per_epoch))
    assert all(shown[item] == 60 for item in range(20))
    turns = [shown[item] for item in range(20, 50)]
    assert sum(turns) == 60 * expected and max(turns) - min(turns) <= 1


def test_regularisation_images_of_a_size_that_nothing_else_has_come_up_too():
    plan = with_prior([(SIZES[0], 1)] * 4, [(SIZES[0], 1)] * 40 + [(SIZES[1], 1)], global_batch=2)
    shown = {draw.item for step in range(20 * plan.steps_per_epoch) for draw in plan.batch(step)}
    assert shown == set(range(45))


def test_without_regularisation_the_order_is_what_it_was():
    items = [(size, 2) for size in SIZES] * 3
    assert [with_prior(items, []).batch(step) for step in range(30)] == [order(items).batch(step) for step in range(30)]
    assert [draw.item for draw in order(items).batch(7)] == [7, 1, 4, 4]
