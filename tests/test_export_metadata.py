"""What UIs read from a file's header, that it stays small, and that nothing private gets into it."""

import base64
import io
import json
import tomllib
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from trainer import preset, schema
from trainer.export import header
from trainer.export.metadata import (
    COVER_BYTES,
    PRESET_KEY,
    TAG_BYTES,
    Dataset,
    build,
    capped,
    last_part,
    without_paths,
)
from trainer.export.sizes import true_sizes
from trainer.export.writer import write

PRESET = """
# kept at /home/ann/private/notes
[model]
family = "sd15"
base = "/home/ann/models/dreamy.safetensors"
vae = 'C:\\Users\\ann\\vae.safetensors'
[data]
folder = ["/home/ann/pictures/10_ink", "/home/ann/pictures/wash/"]
resolution = 128
trigger = "inkwash"
[adapter]
method = "stella"
[train]
steps = 500
lr = 8e-4
seed = 7
optimizer = "adamw"
[evaluate]
folder = "/home/ann/held-out"
"""
DATASET = Dataset(folders={"/home/ann/pictures/10_ink": (10, 20), "wash": (1, 4)},
                  buckets={(128, 128): 20, (96, 160): 4},
                  tags={"10_ink": {"ink": 20, "größe": 3}, "wash": {"wash": 4}})


@pytest.fixture
def texts():
    return build(preset=preset.parse(PRESET, "a.toml"), run_name="ink", dataset=DATASET, prediction="epsilon", rank=8,
                 steps=400, epochs=3, global_batch=4, started_at=1.7e9, finished_at=1.7e9 + 60.5)


def test_the_core_that_uis_read_is_there(texts):
    expected = {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "8", "ss_network_alpha": "8.0", "ss_sd_model_name": "dreamy.safetensors",
        "ss_clip_skip": "1", "ss_seed": "7", "ss_learning_rate": "0.0008", "ss_steps": "400", "ss_num_epochs": "3",
        "ss_training_started_at": "1700000000.0", "ss_num_train_images": "24",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "ink", "modelspec.resolution": "128x128",
        "modelspec.date": "2023-11-14T22:14:20+00:00", "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "inkwash",
    }
    assert {key: texts.get(key) for key in expected} == expected
    assert all(isinstance(value, str) and value for value in texts.values())
    assert "lora_adapter_metadata" not in texts


def test_json_texts_have_the_form_that_a1111_parses(texts):
    assert json.loads(texts["ss_dataset_dirs"]) == {"10_ink": {"n_repeats": 10, "img_count": 20},
                                                    "wash": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(texts["ss_tag_frequency"])["10_ink"] == {"ink": 20, "größe": 3}
    assert json.loads(texts["ss_bucket_info"])["buckets"]["0"] == {"resolution": [96, 160], "count": 4}


def test_the_preset_inside_can_be_trained_from_and_says_the_same(texts):
    inside = preset.parse(texts[PRESET_KEY], "inside.toml")
    assert inside.train == preset.parse(PRESET, "a.toml").train
    assert inside.data.folder == ["10_ink", "wash"] and inside.model.vae == "vae.safetensors"


def test_no_local_path_and_no_comment_gets_in(texts):
    everything = json.dumps(texts, ensure_ascii=False)
    for private in ("/home", "ann", "Users", "notes", "\\\\"):
        assert private not in everything, private


def test_every_path_of_the_schema_is_cut():
    data = tomllib.loads(PRESET.replace("sd15", "sdxl"))  # the family with all of them
    for section in schema.SECTIONS:
        for key in schema.fields(section):
            if schema.has_path(section, key) and (section, key) != ("data", "folder"):
                data.setdefault(section, {})[key] = f"/secret/place/{key}"
    checked, problems = preset.check(data)
    assert checked is not None, problems
    assert "secret" not in preset.dumps(without_paths(checked))


def textual(*overrides, **changes):
    return build(**dict(preset=preset.parse(PRESET, "a.toml", list(overrides)), run_name="ink", dataset=DATASET,
                        prediction="epsilon", rank=8, steps=1, epochs=1, global_batch=1, started_at=0.0,
                        finished_at=0.0) | changes)


def test_whole_paths_are_kept_when_asked_for():
    texts = textual("output.full_paths=true")
    assert preset.parse(texts[PRESET_KEY], "inside.toml").model.base == "/home/ann/models/dreamy.safetensors"
    assert texts["ss_sd_model_name"] == "dreamy.safetensors" and "notes" not in texts[PRESET_KEY]


def test_trigger_words_are_there_for_comfyui():
    assert json.loads(textual()["trained_words"]) == ["inkwash"]
    assert "trained_words" not in textual("data.trigger=")


@pytest.mark.parametrize(("size", "mode"), [((1024, 768), "RGB"), ((96, 300), "RGBA"), ((64, 64), "L")])
def test_a_cover_is_a_small_jpeg_in_two_places(tmp_path, size, mode):
    noise = torch.randint(0, 256, (size[1], size[0], len(mode)), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.to(torch.uint8).squeeze(2).numpy(), mode).save(tmp_path / "a.png")
    texts = textual(cover=tmp_path / "a.png")
    (text,) = json.loads(texts["ssmd_cover_images"])
    content = base64.b64decode(text)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "JPEG" and picture.mode == "RGB" and max(picture.size) <= 512
        assert abs(picture.width / picture.height - size[0] / size[1]) < 0.02
    assert len(content) <= COVER_BYTES and texts["modelspec.thumbnail"] == f"data:image/jpeg;base64,{text}"
    assert "ssmd_cover_images" not in textual()


def test_the_header_of_every_layer_of_sdxl_with_all_that_fits_is_under_a_megabyte(tmp_path):
    """ComfyUI shows nothing of a longer one."""
    noise = torch.randint(0, 256, (512, 512, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "a.png")
    tags = {"ink": {f"some tag number {i}": i for i in range(40_000)}}
    texts = textual(cover=tmp_path / "a.png", dataset=replace(DATASET, tags=tags), rank=1)
    pairs = [(name, torch.ones(m, 1, *[1] * len(kernel)), torch.ones(1, n, *kernel), torch.ones(1, n))
             for name, (m, n, *kernel) in true_sizes("sdxl")["SDXL"].items()]
    written = write(tmp_path / "all.safetensors", pairs, family="sdxl", dtype="fp16", metadata=texts)
    assert written.unmatched == [] and written.tensors > 4000
    assert 700_000 < header.read(written.path).begin < 1 << 20


@pytest.mark.parametrize(("overrides", "module"), [
    ([], "networks.lora"), (['adapter.targets=["attention", "convolution"]'], "lycoris.kohya"),
    (["model.family=flux1", "output.format=F5", "model.vae=", "adapter.method=lora"], "networks.lora_flux"),
    (["model.family=flux1", 'adapter.targets=["all"]'], "networks.lora")])
def test_the_network_module_is_the_one_that_made_such_files_first(overrides, module):
    assert textual(*overrides)["ss_network_module"] == module


def test_dora_names_the_module_that_reads_it():
    texts = build(preset=preset.parse(PRESET, "a.toml", ["adapter.dora=true", "adapter.method=lora"]), run_name="ink",
                  dataset=Dataset(), prediction="v_prediction", rank=8, steps=1, epochs=1, global_batch=1,
                  started_at=0.0, finished_at=0.0)
    assert texts["ss_network_module"] == "lycoris.kohya" and texts["modelspec.prediction_type"] == "v"
    assert not {"ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info"} & texts.keys()  # "{}" would be worse than none


def test_the_most_frequent_tags_stay_when_there_are_too_many():
    tags = {"a": {f'tag "{i}" 東京': i for i in range(3000)}, "b": {"rare": 1, "x" * 500: 10_000, "common": 9000}}
    kept = capped(tags, 20_000)
    assert kept["b"] == {"common": 9000} and 'tag "2999" 東京' in kept["a"] and 'tag "5" 東京' not in kept["a"]
    assert 15_000 < len(json.dumps(json.dumps(kept, ensure_ascii=False), ensure_ascii=False).encode()) <= 20_000


def test_a_large_data_set_keeps_the_header_under_a_megabyte(tmp_path):
    tags = {f"folder{f}": {f"some tag number {f} {i}": i for i in range(20_000)} for f in range(10)}
    texts = build(preset=preset.parse(PRESET, "a.toml"), run_name="ink", dataset=replace(DATASET, tags=tags),
                  prediction="epsilon", rank=1, steps=1, epochs=1, global_batch=1, started_at=0.0, finished_at=0.0)
    assert TAG_BYTES * 0.8 < len(json.dumps(texts["ss_tag_frequency"], ensure_ascii=False).encode()) < TAG_BYTES + 10
    written = write(tmp_path / "ink-000500.safetensors", [("unet.conv_in", torch.ones(1, 1), torch.ones(1, 1), None)],
                    family="sd15", dtype="fp16", metadata=texts)
    assert written.bytes < 1 << 19
    with safe_open(written.path, "pt") as file:
        assert file.metadata().items() >= texts.items()
        assert file.metadata()["ss_output_name"] == "ink-000500"


@pytest.mark.parametrize(("family", "variant", "version", "architecture"), [
    ("sdxl", "", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"), ("flux1", "", "flux1", "flux-1-dev/lora"),
    ("flux1", "schnell", "flux1", "flux-1-schnell/lora"), ("flux2", "", "flux2", "Flux.2/lora"),
    ("flux2", "klein-4b", "flux2_klein_4b", "Flux.2/lora"), ("flux2", "klein-9b", "flux2_klein_9b", "Flux.2/lora"),
    ("flux2", "klein", "flux2", "Flux.2/lora")])
def test_files_say_which_model_of_a_family_they_are_for(family, variant, version, architecture):
    texts = build(preset=preset.parse(PRESET.replace("sd15", family), "a.toml"), run_name="ink", dataset=Dataset(),
                  prediction="flow", rank=8, steps=1, epochs=1, global_batch=1, started_at=0.0, finished_at=0.0,
                  variant=variant)
    assert (texts["ss_base_model_version"], texts["modelspec.architecture"]) == (version, architecture)


@pytest.mark.parametrize("path, name", [("/a/b", "b"), ("/a/b/", "b"), ("C:\\x\\y.safetensors", "y.safetensors"),
                                        ("owner/model", "model"), ("plain", "plain"), ("", "")])
def test_paths_are_cut_to_their_last_part(path, name):
    assert last_part(path) == name
