"""The demo's shipped data: picture sets, captions, and a base model that loads without a network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

DEMO = Path(__file__).parent.parent / "presets" / "demo"
BASE = DEMO / "base"
MB = 1_000_000


def _pictures(name):
    return sorted((DEMO / name).glob("*.png"))


def _words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32, local_files_only=True)


@pytest.mark.parametrize(("name", "count"), [("concept", 24), ("heldout", 48)])
def test_sets_have_their_number_of_128_px_pictures_with_captions(name, count):
    pictures = _pictures(name)
    assert len(pictures) == count
    for picture in pictures:
        with Image.open(picture) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")
        caption = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
        label = picture.stem.replace("_", " ")
        assert caption == f"openmoji style, {label}" or caption.startswith(f"openmoji style, {label}, ")


def test_no_held_out_picture_is_taught():
    concept, held_out = ({(p.stem, p.read_bytes()) for p in _pictures(name)} for name in ("concept", "heldout"))
    assert not {stem for stem, _ in concept} & {stem for stem, _ in held_out}
    assert not {data for _, data in concept} & {data for _, data in held_out}


def test_target_style_is_no_style_of_the_base():
    training = json.loads((BASE / "training.json").read_text(encoding="utf-8"))
    caption = _pictures("concept")[0].with_suffix(".txt").read_text(encoding="utf-8")
    trigger = _words(caption.split(",")[0]) - {"style"}
    assert trigger == {"openmoji"}
    assert not trigger & (_words(" ".join(training["style_words"])) | set(training["styles"]))


def test_target_word_is_one_token_between_the_known_styles(pipeline):
    """Never trained on, it was put at the mean of the known styles' words."""
    tokenizer, weight = pipeline.tokenizer, pipeline.text_encoder.get_input_embeddings().weight
    [target], *known = (tokenizer(w, add_special_tokens=False).input_ids
                        for w in ("openmoji", "noto", "twemoji", "fluent"))  # fmt: skip
    mean = torch.stack([weight[one] for [one] in known]).float().mean(0)
    assert torch.allclose(weight[target].float(), mean, atol=1e-3)


def test_base_is_small_enough_to_clone():
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 48 * MB
    assert max(file.stat().st_size for file in files) < 16 * MB


def test_base_draws_a_red_apple_on_white(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "twemoji style, red apple, fruit",
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images[0]  # c h w in [0, 1]
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    red, green, blue = image[:, 48:80, 48:80].mean(dim=(1, 2)).tolist()
    assert corners.min() > 0.9
    assert red > 0.6 and red > 1.5 * max(green, blue)


def test_base_is_v_prediction_with_zero_terminal_snr(pipeline):
    config = pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing"
    assert pipeline.scheduler.alphas_cumprod[-1] < 1e-6
    assert pipeline.vae.config.scaling_factor == 1.0
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id


def test_build_says_how_to_fetch_missing_packages(tmp_path):
    command = [sys.executable, DEMO / "build_base.py", "render", "--packages", tmp_path, "--work", tmp_path / "work"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "npm pack @iconify-json/openmoji@1.2.29" in done.stderr and "Traceback" not in done.stderr


def test_notice_names_every_source_with_its_licence():
    notice = (DEMO / "NOTICE").read_text(encoding="utf-8")
    for package, licence in {
        "@iconify-json/noto 1.2.9": "Apache-2.0",
        "@iconify-json/twemoji 1.2.5": "CC-BY-4.0",
        "@iconify-json/openmoji 1.2.29": "CC-BY-SA-4.0",
        "@iconify-json/fluent-emoji-flat 1.2.6": "MIT",
        "@lobehub/fluent-emoji-3d 1.1.0": "MIT",
        "emojibase-data 17.0.0": "MIT",
    }.items():
        [line] = [line for line in notice.splitlines() if package in line]
        assert line.endswith(licence)
