"""What a run trains on: images in two sets, their captions, sizes, order, and a fingerprint of it all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from trainer import preset as presets
from trainer.data.cache import Cache
from trainer.errors import UserError
from trainer.material import Material, noise_seeds, plain_draw, to_device


def material(preset_file: Path, *overrides: str) -> Material:
    return Material(presets.load(preset_file, overrides), bucket_step=8)


def test_training_and_held_out_images_come_from_their_folders(tiny_project) -> None:
    found = material(tiny_project)
    assert [item.path.parent.name for item in found.train + found.held] == ["train"] * 7 + ["held"] * 4


def test_a_share_is_held_out_when_there_is_no_folder_for_it(tiny_project) -> None:
    found = material(tiny_project, "evaluate.folder=", "evaluate.holdout=0.3")
    assert (len(found.train), len(found.held)) == (5, 2)
    assert not {item.sha256 for item in found.train} & {item.sha256 for item in found.held}


def test_several_folders_are_one_data_set(tiny_project) -> None:
    folders = [(tiny_project.parent / name).as_posix() for name in ("train", "held")]
    found = material(tiny_project, f"data.folder={folders}", "evaluate.folder=", "evaluate.holdout=0")
    assert len(found.train) == 11


def test_what_is_held_out_is_not_trained_on_wherever_it_lies(own_project) -> None:
    train, held = (own_project.parent / name for name in ("train", "held"))
    shutil.copytree(held, train / "held")
    (train / "copy.png").write_bytes((held / "000.png").read_bytes())
    found = material(own_project)
    assert (len(found.train), len(found.held)) == (7, 4)
    assert "held out, so not trained on though they lie among the images to train on: 5, such as " in found.remarks[-1]
    with pytest.raises(UserError, match="evaluate.folder: every image of data.folder is in .* too"):
        material(own_project, f"data.folder={held.as_posix()}")


def test_a_broken_image_is_remembered_with_its_set(own_project) -> None:
    for folder in ("train", "held"):
        (own_project.parent / folder / "000.png").write_bytes(b"\x89PNG")
    found = material(own_project)
    assert [skipped.file.parent.name for skipped in found.skipped] == ["train", "held"]


def test_the_fingerprint_follows_images_captions_and_repeats_and_nothing_else(own_project) -> None:
    prints = [material(own_project).fingerprint(), material(own_project, "data.resolution=128").fingerprint()]
    assert prints[0] == prints[1]
    prints.append(material(own_project, "data.repeats=2").fingerprint())
    (own_project.parent / "train" / "001.txt").write_text("something else")
    prints.append(material(own_project).fingerprint())
    (own_project.parent / "train" / "002.png").unlink()
    prints.append(material(own_project).fingerprint())
    assert len(set(prints)) == 4


def test_captions_of_training_are_shuffled_and_those_held_out_are_not(tiny_project) -> None:
    found = material(tiny_project, "data.trigger=xyz", "data.caption_variants=4", "data.keep_tags=1")
    variants = found.train_captions(found.train[0])
    assert len(variants) == 4 and all(text.startswith("xyz, ") for text in variants) and len(set(variants)) > 1
    assert found.held_caption(found.held[0]) == f"xyz, {found.held[0].caption}"


def test_every_text_that_a_run_shows_the_model_is_among_its_prompts(tiny_project) -> None:
    found = material(tiny_project, "sample.negative=blurry")
    needed = {"", "blurry", "a red circle", *(found.held_caption(item) for item in found.held)}
    needed |= {text for item in found.train for text in found.train_captions(item)}
    assert set(found.prompts()) == needed and len(found.prompts()) == len(needed)


def test_an_epoch_shows_each_image_as_often_as_the_preset_says(tiny_project, tmp_path) -> None:
    found = material(tiny_project, "data.repeats=2", "data.crop=random", "data.crop_variants=3")
    store = found.latent_store(found.train, Cache(tmp_path), "vae", torch.float32, training=True)
    order = found.order(store, global_batch=2)
    draws = [draw for step in range(order.steps_per_epoch) for draw in order.batch(step)]
    assert all(sum(draw.item == index for draw in draws) >= 2 for index in range(7))
    assert {draw.crop for draw in draws} <= {0, 1, 2} and len({draw.flip for draw in draws}) == 2


def test_held_out_latents_are_the_plain_middle(tiny_project, tmp_path) -> None:
    found = material(tiny_project, "data.crop=random")
    cache = Cache(tmp_path)
    training = found.latent_store(found.held, cache, "vae", torch.float32, training=True)
    plain = found.latent_store(found.held, cache, "vae", torch.float32, training=False)
    assert len(plain.missing()) == len(found.held) < len(training.missing())


def test_noise_follows_the_sample_and_the_seed(tiny_project) -> None:
    draws = [plain_draw(index) for index in range(3)]
    assert noise_seeds(draws, 0) == noise_seeds(draws, 0)
    assert len({*noise_seeds(draws, 0), *noise_seeds(draws, 1)}) == 6


def test_only_floats_change_their_kind_on_the_way_to_a_device() -> None:
    given = {"embeds": torch.ones(2), "mask": torch.ones(2, dtype=torch.long)}
    moved = to_device(given, torch.device("cpu"), torch.bfloat16)
    assert (moved["embeds"].dtype, moved["mask"].dtype) == (torch.bfloat16, torch.long)
