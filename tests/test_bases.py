"""Base models of other programs are found, told apart by their shapes, and given the parts that they lack."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from tests import models, models_flux, models_sdxl
from trainer import bases, families, model_folders
from trainer.__main__ import main
from trainer.bases import COMPONENTS, Index
from trainer.model_folders import Place, places_in, usual_places


@pytest.fixture(scope="module")
def comfy(tmp_path_factory) -> Path:
    """ComfyUI with a klein and a Flux.1 in split files, an SDXL checkpoint, a LoRA, and SD 1.5 as a folder."""
    top = tmp_path_factory.mktemp("top")
    kept = top / "ComfyUI/models"
    klein = models_flux.split_files(top / "a", models_flux.klein_folder(top / "klein"), "model.diffusion_model.")
    flux = models_flux.split_files(top / "b", models_flux.flux1_folder(top / "flux"))
    for source, name in ((klein["transformer"], "diffusion_models/flux-2-klein-base-4b"),
                         (klein["vae"], "vae/flux2-vae"), (klein["text_encoder"], "text_encoders/qwen"),
                         (flux["transformer"], "diffusion_models/flux1-dev"), (flux["vae"], "vae/ae"),
                         (flux["vae"], "vae/sd3_vae"), (flux["text_encoder"], "text_encoders/clip_l"),
                         (flux["text_encoder_2"], "text_encoders/t5xxl_fp16")):
        goal = kept / f"{name}.safetensors"
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, goal)
    models_sdxl.single_file(kept / "checkpoints/sub/sdxl.safetensors", models_sdxl.folder(top / "sdxl"))
    models.sd15_folder(kept / "diffusers/sd15")
    return top / "ComfyUI"


def found(*folders: Path) -> dict[str, bases.Found]:
    return {one.name: one for one in Index().find([place for folder in folders for place in places_in(folder)])}


def header_only(file: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    """A file with tensors of these shapes and no numbers in them."""
    place, entries = 0, {}
    for name, shape in tensors.items():
        size = 1
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [place, place := place + size]}
    text = json.dumps(entries).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + place)
    return file


def test_every_family_is_found_and_what_is_ready_can_be_opened(comfy):
    known = found(comfy)
    assert {name: (one.family, one.is_ready) for name, one in known.items()} == {
        "flux-2-klein-base-4b": ("flux2", True), "flux1-dev": ("flux1", True), "sdxl": ("sdxl", True),
        "sd15": ("sd15", True)}
    for one in known.values():
        own = comfy.parent / {"flux1": "flux", "flux2": "klein", "sdxl": "sdxl"}.get(one.family, "")
        parts = one.parts | {name: str(own / name) for name in ("tokenizer", "tokenizer_2")  # tiny models have own ones
                             if (own / name).is_dir()}
        assert set(families.get(one.family).open_base(one.base, **parts).parts) == set(COMPONENTS[one.family])


def test_split_files_get_their_own_parts(comfy):
    known = found(comfy)
    kept = comfy / "models"
    assert known["flux1-dev"].parts == {
        "vae": str(kept / "vae/ae.safetensors"), "text_encoder": str(kept / "text_encoders/clip_l.safetensors"),
        "text_encoder_2": str(kept / "text_encoders/t5xxl_fp16.safetensors"), "tokenizer_2": "google-t5/t5-base"}
    assert known["flux-2-klein-base-4b"].parts["text_encoder"].endswith("qwen.safetensors")
    assert known["sdxl"].parts == known["sd15"].parts == {}


def test_what_is_missing_is_named(comfy, tmp_path):
    shutil.copytree(comfy, tmp_path / "ComfyUI")
    (tmp_path / "ComfyUI/models/vae/ae.safetensors").unlink()
    (tmp_path / "ComfyUI/models/text_encoders/qwen.safetensors").unlink()
    shutil.rmtree(tmp_path / "ComfyUI/models/diffusers/sd15/vae")
    known = found(tmp_path / "ComfyUI")
    assert known["flux1-dev"].missing == ("Flux.1's VAE, such as ae.safetensors, for model.vae",)  # not SD 3's
    assert "for model.text_encoder" in known["flux-2-klein-base-4b"].missing[0]
    assert known["sd15"].missing == ("the folder vae, whole",)


def test_true_shapes_are_told_apart(tmp_path):
    kept = tmp_path / "models"
    klein = {"double_stream_modulation_img.lin.weight": (6, 1), "img_in.weight": (1, 128), "txt_in.weight": (1, 7680)}
    header_only(kept / "diffusion_models/flux-2-klein-4b.safetensors", klein)
    header_only(kept / "diffusion_models/dev.safetensors",
                klein | {"txt_in.weight": (1, 15360), "guidance_in.in_layer.weight": (1, 1)})
    header_only(kept / "checkpoints/sd3.safetensors", {"joint_blocks.0.x.weight": (1, 1)})
    encoder = "model.layers.0.self_attn."
    header_only(kept / "text_encoders/b_4b.safetensors",
                {"model.embed_tokens.weight": (2, 2560), f"{encoder}q_norm.weight": (128,)})
    header_only(kept / "text_encoders/a_8b.safetensors",
                {"model.embed_tokens.weight": (2, 4096), f"{encoder}q_norm.weight": (128,)})
    header_only(kept / "vae/flux2-vae.safetensors", {"decoder.conv_in.weight": (8, 32, 3, 3)})
    header_only(kept / "vae/wan.safetensors", {"decoder.conv_in.weight": (8, 32, 3, 3, 3)})
    known = found(tmp_path)
    assert known["flux-2-klein-4b"].parts == {"vae": str(kept / "vae/flux2-vae.safetensors"),
                                              "text_encoder": str(kept / "text_encoders/b_4b.safetensors")}
    assert "distilled to four steps" in known["flux-2-klein-4b"].note
    assert known["dev"].missing == ("the text encoder Mistral Small (5120 wide), for model.text_encoder",)
    assert (known["sd3"].family, known["sd3"].note) == ("", "an SD 3 model, which is not trained here")


def test_damaged_files_are_told_and_links_in_a_ring_end(tmp_path):
    (tmp_path / "models/checkpoints").mkdir(parents=True)
    (tmp_path / "models/checkpoints/broken.safetensors").write_bytes(b"<html>")
    (tmp_path / "models/checkpoints/ring").symlink_to(tmp_path / "models")
    known = found(tmp_path)
    assert list(known) == ["broken"] and known["broken"].family == "" and "a web page" in known["broken"].note


def test_a_second_look_reads_only_what_is_new(comfy, monkeypatch):
    index, read = Index(), []
    first = index.find(places_in(comfy))
    monkeypatch.setattr(bases, "read_header", read.append)
    assert index.find(places_in(comfy)) == first and read == []


def test_the_components_are_those_of_the_families():
    assert {family: set(names) for family, names in COMPONENTS.items()} == {
        family: set(families.get(family).PARTS) for family in COMPONENTS}


def test_usual_places_and_comfyuis_own_list_are_followed(comfy, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "ComfyUI/models/loras").mkdir(parents=True)
    (home / "more/vae").mkdir(parents=True)
    (home / "ComfyUI/extra_model_paths.yaml").write_text(
        f"mine:\n  base_path: {home}/more\n  vae: |\n    vae\n    nowhere\n  loras: ../ComfyUI\nodd: 3\n")
    hub = home / "hub"
    snapshots = hub / "models--someone--tiny/snapshots"
    (snapshots / "old").mkdir(parents=True)
    shutil.copytree(comfy / "models/diffusers/sd15", snapshots / "new")
    (hub / "models--someone--tiny/refs").mkdir()
    (hub / "models--someone--tiny/refs/main").write_text("new")
    monkeypatch.setattr(model_folders, "HUB", hub)
    places = usual_places([home, tmp_path / "nowhere"])
    assert Place("ComfyUI", home / "more/vae") in places and Place("Hugging Face cache", hub) in places
    assert not [place for place in places if "loras" in str(place.folder)]
    [one] = Index().find(places)
    assert (one.base, one.family, one.is_ready) == ("someone/tiny", "sd15", True)


def test_the_command_prints_them(comfy, capsys):
    assert main(["bases", str(comfy)]) == 0
    told = capsys.readouterr().out
    assert "flux2" in told and "ready" in told and f"  model.vae = {comfy}/models/vae/flux2-vae.safetensors" in told
    assert main(["bases", str(comfy), "--json"]) == 0
    assert {one["family"] for one in json.loads(capsys.readouterr().out)} == {"sd15", "sdxl", "flux1", "flux2"}
    assert main(["bases", str(comfy / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
