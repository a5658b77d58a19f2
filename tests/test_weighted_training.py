"""Training with masks and regularisation images: what is weighted, what is left alone, and exact resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import family_runs, projects
from tests.test_loop import events, go_on, start, stop_at
from trainer import check
from trainer import preset as presets
from trainer import run as runs
from trainer.data.folders import mask_of
from trainer.data.mask_store import MaskStore
from trainer.evaluation import validate
from trainer.loop import run_training
from trainer.material import noise_seeds
from trainer.objective import per_sample_loss, pixel_weights
from trainer.session import Session

QUIET = ("evaluate.every=0", "log.rank_every=0", "sample.prompts=[]")


def add_masks(folder: Path, every: int = 2) -> None:
    """The left half of every second image is masked in."""
    for image in sorted(folder.glob("*.png"))[::every]:
        with Image.open(image) as opened:
            mask = Image.new("L", opened.size)
            mask.paste(255, (0, 0, opened.width // 2, opened.height))
        mask.save(mask_of(image))


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """The preset of a project whose images 0, 2, 4 and 6, and held-out images 0 and 2, have masks; read it only."""
    preset = projects.make(tmp_path_factory.mktemp("masked"))
    add_masks(preset.parent / "train")
    add_masks(preset.parent / "held")
    projects.pictures(preset.parent / "prior", 5, seed=7)
    return preset


@pytest.fixture(scope="module")
def session(masked) -> Session:
    return projects.session(masked, masked.parent, *QUIET)


def loss_without_weights(session: Session, draws: list) -> torch.Tensor:
    """Loss of each sample at each place.  # b c h w"""
    latents = session.latents.latents(draws, "cpu")
    noise, timesteps = session.objective.draw(noise_seeds(draws, session.preset.train.seed), latents.shape[1:], "cpu",
                                              latents.dtype)
    texts = ["" if draw.caption < 0 else session.captions[draw.item][draw.caption] for draw in draws]
    prediction = session.predict(latents, noise, timesteps, session.conditioning(texts))
    return (prediction - session.objective.target(latents, noise, timesteps)).square()


@pytest.mark.parametrize("family", ["sd15", "flux1", "flux2"])
def test_the_loss_is_weighted_at_the_masked_places_of_each_image(family, tmp_path):
    base = family_runs.MAKERS[family](tmp_path / "base")
    preset = family_runs.project(tmp_path, family, base)
    add_masks(tmp_path / "train", every=1)
    session = projects.session(preset, tmp_path, *family_runs.SMALL, "data.mask_background=0.25", *QUIET,
                               "data.buckets=false")  # squares, so that halves end between latents
    session.use("raw")
    draws = session.order.batch(1)
    with torch.no_grad():
        places, loss = loss_without_weights(session, draws), session.loss(draws)
    height, width = places.shape[-2:]
    weights = torch.full((1, 1, height, width), 0.4)
    half = slice(width // 2, None) if draws[0].flip else slice(0, width // 2)
    weights[..., half] = 1.6  # 1 against 0.25, of mean 1
    torch.testing.assert_close(loss, (places * weights).mean())
    assert not torch.allclose(loss, places.mean(), rtol=1e-4)


def test_what_lies_outside_of_a_mask_has_no_say_in_the_gradient(session):
    session.use("raw")
    draws = [draw for step in range(20) for draw in session.order.batch(step) if draw.item == 2][:1]
    latents = session.latents.latents(draws, "cpu")
    noise, timesteps = session.objective.draw([1], latents.shape[1:], "cpu", latents.dtype)
    with torch.no_grad():
        prediction = session.predict(latents, noise, timesteps, session.conditioning([""]))
    prediction.requires_grad_()
    weights = pixel_weights(session.masks.masks(draws, "cpu"), background=0.0)
    gradient, = torch.autograd.grad(per_sample_loss(prediction, noise, weights=weights).sum(), prediction)
    outside = (weights == 0).expand_as(gradient)
    assert outside.float().mean() == 0.5 and gradient[outside].eq(0).all() and gradient[~outside].ne(0).all()


def test_a_batch_mixes_images_with_masks_and_without(session):
    batches = [session.order.batch(step) for step in range(99)]
    mixed = next(draws for draws in batches if len({draw.item % 2 for draw in draws}) == 2)
    weights = session.pixel_weights(session.masks, mixed)
    for draw, row in zip(mixed, weights):
        assert row.eq(1).all() == bool(draw.item % 2)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))
    plain = next(draws for draws in batches if all(draw.item % 2 for draw in draws))
    assert session.pixel_weights(session.masks, plain) is None


def test_validation_is_weighted_as_training_is(session):
    loss, masks = validate(session, 0), session.held_masks
    assert validate(session, 0) == loss
    session.held_masks = MaskStore(session.held_latents)
    session.held_masks.masked = frozenset()
    assert validate(session, 0) != pytest.approx(loss, rel=1e-4)
    session.held_masks = masks


def prior_of(preset: Path) -> str:
    """The setting of the project's regularisation folder."""
    return f"data.regularisation={preset.parent / 'prior'}"


def test_regularisation_images_have_their_own_weight_and_no_trigger_word(masked):
    options = (prior_of(masked), "data.trigger=mine", "data.masks=off", "train.batch_size=1", *QUIET)
    plain = projects.session(masked, masked.parent, *options, name="prior")
    weighted = presets.load(masked, [*options, "data.regularisation_weight=0.25"])
    assert [item.prior for item in plain.latents.items] == [False] * 7 + [True] * 5
    assert all(text.startswith("mine") for captions in plain.captions[:7] for text in captions)
    assert not any("mine" in text for captions in plain.captions[7:] for text in captions)
    assert plain.order.steps_per_epoch == 14  # half of them regularisation
    seen = set()
    for step in range(14):
        draws = plain.order.batch(step)
        losses = []
        for preset in (plain.preset, weighted):
            plain.material.preset = preset
            plain.use("raw")
            with torch.no_grad():
                losses.append(plain.loss(draws))
        seen.add(prior := draws[0].item >= 7)
        torch.testing.assert_close(losses[1], losses[0] * (0.25 if prior else 1.0))
    assert seen == {True, False}


def test_a_stop_and_a_resume_end_in_the_same_bits(masked, tmp_path):
    options = (prior_of(masked), "data.regularisation_weight=0.5", "data.mask_background=0.2", *QUIET)
    whole = start(masked, tmp_path, "whole", *options)
    assert [event["text"] for event in events(whole, "note")][:2] == [
        "with a mask: 4 of 7 images; outside of it the loss weighs 0.2",
        "regularisation images: 5, about 50% of the samples"]
    loaded = presets.load(masked, options)
    broken = runs.create(tmp_path, "broken", presets.dumps(loaded))
    stop_at(broken, 4)
    run_training(broken, loaded, tmp_path)
    assert broken.last_step() < 6
    go_on(broken)
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        first, second = (load_file(run.checkpoint(6) / file) for run in (whole, broken))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_check_tells_what_is_excluded_masked_and_regularised(masked, tmp_path):
    list_of_excluded = masked.parent / "train" / ".excluded"
    list_of_excluded.write_text("003.png\n")
    report = check.inspect(presets.load(masked, [prior_of(masked)]), tmp_path)
    list_of_excluded.unlink()
    assert report.facts["training images"] == 6 and not report.errors
    assert report.facts["remarks"].split("; ") == [
        "excluded in the data set: 1 of 7 images", "with a mask: 4 of 6 images", "outside of it the loss weighs 0.1",
        "regularisation images: 5, about 50% of the samples"]
