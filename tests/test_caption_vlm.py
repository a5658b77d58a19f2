"""Vision-language models of every kind that is offered answer for each image, alone or in a batch."""

import functools
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import models_caption
from trainer.caption.vlm import DESCRIBE, IMAGE_TOKEN, KINDS, Describer, _qwen, read_config
from trainer.errors import UserError

MAKERS = {"blip": models_caption.blip, "florence2": models_caption.florence, "qwen2_5_vl": models_caption.qwen,
          "qwen3_vl": functools.partial(models_caption.qwen, version="3")}
IMAGES = [Image.new("RGB", (100, 70), "red"), Image.new("RGB", (64, 120), "blue"), Image.new("RGB", (60, 60), "white")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("captioners")
    return {kind: make(root / kind) for kind, make in MAKERS.items()}


def describer(folder: Path, instruction: str = "", dtype: torch.dtype = torch.float32) -> Describer:
    return Describer(folder, instruction=instruction, max_tokens=6, device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize("kind", MAKERS)
def test_each_image_gets_the_same_text_alone_and_in_a_batch(folders, kind):
    model = describer(folders[kind])
    together = model.caption(IMAGES)
    assert all(together) and together == [model.caption([image])[0] for image in IMAGES]
    assert together == describer(folders[kind]).caption(IMAGES)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_image_and_the_instruction_reach_the_model(folders, kind):
    """Of random weights the likeliest words may be the same, so the inputs and what comes of them are compared."""
    def scores(instruction: str, image: Image.Image) -> torch.Tensor:
        model = describer(folders[kind], instruction)
        inputs = model.kind.prepare(model, [image])
        if kind == "blip":
            out = model.model.text_decoder(inputs["input_ids"], encoder_hidden_states=model.model.vision_model(
                inputs["pixel_values"])[0])
        elif kind == "florence2":
            out = model.model(**inputs, decoder_input_ids=torch.tensor([[0]]))
        else:
            out = model.model(**inputs)
        return out.logits[0, -1]

    with torch.no_grad():
        base = scores("photo of red", IMAGES[0])
        assert torch.equal(base, scores("photo of red", IMAGES[0]))
        assert not torch.equal(base, scores("photo of circle", IMAGES[0]))
        assert not torch.equal(base, scores("photo of red", IMAGES[2]))


def test_half_precision_is_loaded_and_answers(folders):
    for kind in MAKERS:
        model = describer(folders[kind], dtype=torch.bfloat16)
        assert model.model.dtype == torch.bfloat16 and len(model.caption(IMAGES[:2])) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_answers_in_half_precision(folders):
    for kind in MAKERS:
        for dtype in (torch.bfloat16, torch.float16):
            model = Describer(folders[kind], instruction="", max_tokens=6, device=torch.device("cuda"), dtype=dtype)
            assert len(model.caption(IMAGES)) == 3


def test_qwen_gets_a_token_for_each_merged_patch_and_knows_which_they_are(folders):
    model = describer(folders["qwen2_5_vl"], "hello")
    inputs = _qwen(model, IMAGES)
    assert inputs["attention_mask"][:, -1].all()  # padded on the left: generation goes on from the end
    for row, grid in enumerate(inputs["image_grid_thw"]):
        places = inputs["input_ids"][row] == model.model.config.image_token_id
        assert places.sum() == grid.prod() // 4 == inputs["mm_token_type_ids"][row].sum()
    text = model.tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0].bool()])
    assert text.replace(IMAGE_TOKEN, "") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>"
        "hello<|im_end|>\n<|im_start|>assistant\n")


def test_an_empty_instruction_is_the_usual_one(folders):
    assert describer(folders["qwen2_5_vl"], "  ").instruction == DESCRIBE
    assert describer(folders["florence2"]).instruction == "<DETAILED_CAPTION>"
    assert describer(folders["blip"], "photo of").caption(IMAGES[:1])[0].startswith("photo of")


def test_florence_refuses_a_task_within_other_words(folders):
    with pytest.raises(UserError, match="captioning.instruction: Florence-2 does not take 'please <CAPTION>'"):
        describer(folders["florence2"], "please <CAPTION>").caption(IMAGES[:1])


@pytest.mark.parametrize(("config", "message"), [
    (None, "no captioner: it has neither a config.json"),
    ("{", "not a model's description"),
    ('["a"]', "not a model's description"),
    ('{"model_type": "llama"}', "a model of the kind 'llama' cannot write captions here; take one of blip, florence2"),
])
def test_a_folder_without_a_captioner_is_refused(tmp_path, config, message):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_florence_as_first_published_is_refused_with_what_to_take(tmp_path):
    with pytest.raises(UserError, match="such as florence-community/Florence-2-base"):
        describer(models_caption.old_florence(tmp_path))


def test_a_folder_that_is_not_whole_is_refused(tmp_path, folders):
    for file in folders["blip"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="the model cannot be loaded: .* Download it again, whole"):
        describer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        describer(tmp_path)


def test_every_kind_that_is_offered_is_tested():
    assert set(KINDS) - set(MAKERS) == {"qwen2_vl"}  # of Qwen2.5's shape in all that happens here
