"""Base models for the form: what was listed can be taken, with its parts, and nothing else."""

import json
import shutil

import pytest

from app import form
from app.base_models import BaseModels
from app.bases import Bases
from app.paths import Places
from tests import models, models_flux
from trainer.errors import UserError

TEXT = ('[model]\nfamily = "sd15"  # kind\nbase = "old"\nvae = "other.safetensors"\n[data]\nfolder = "pictures"\n'
        "[train]\nsteps = 3\n")


@pytest.fixture
def bases(tmp_path):
    """A ComfyUI given with --models, and one in a folder where programs are looked for."""
    files = models_flux.split_files(tmp_path / "files", models_flux.flux1_folder(tmp_path / "flux1"))
    kept = tmp_path / "given/models/diffusion_models"
    kept.mkdir(parents=True)
    for name, file in files.items():
        shutil.copy(file, kept / f"{name}.safetensors")
    models.sd15_folder(tmp_path / "home/ComfyUI/models/diffusers/tiny")
    return BaseModels(Places(tmp_path / "w", (), (tmp_path / "given",), (tmp_path / "home",)))


def ids(bases):
    return {one["name"]: one["id"] for one in bases.listing()["bases"] if one["family"] in ("flux1", "sd15")}


def test_split_files_come_with_their_parts_and_the_text_keeps_its_comments(bases, tmp_path):
    text, said = bases.take(TEXT, ids(bases)["transformer"])
    model = form.values_of(text)["model"]
    kept = tmp_path / "given/models/diffusion_models"
    assert model == {"family": "flux1", "base": f"{kept}/transformer.safetensors", "vae": f"{kept}/vae.safetensors",
                     "text_encoder": f"{kept}/text_encoder.safetensors", "tokenizer_2": "google-t5/t5-base",
                     "text_encoder_2": f"{kept}/text_encoder_2.safetensors"}
    assert "# kind" in text and "Its VAE, text encoder, text encoder 2 and T5 tokenizer came with it." in said


def test_a_whole_model_takes_the_parts_of_the_last_one_out(bases, tmp_path):
    text, said = bases.take(TEXT, ids(bases)["tiny"])
    assert form.values_of(text)["model"] == {"family": "sd15",
                                             "base": str(tmp_path / "home/ComfyUI/models/diffusers/tiny")}
    assert said.endswith("model.vae was taken out: it has its own.")


def test_ones_own_tokenizer_stays(bases):
    text, _ = bases.take(TEXT.replace("vae =", "tokenizer_2 ="), ids(bases)["transformer"])
    assert form.values_of(text)["model"]["tokenizer_2"] == "other.safetensors"


def test_names_that_are_no_text_hide_no_others(bases, tmp_path):
    kept = tmp_path / "given/models"
    shutil.copytree(tmp_path / "home/ComfyUI/models/diffusers/tiny", kept / "caf\udce9")
    shutil.copy(kept / "diffusion_models/vae.safetensors", kept / "\udce9.safetensors")
    assert "tiny" in ids(bases) and json.dumps(bases.listing(), ensure_ascii=False).encode()
    listed = Bases(Places(tmp_path / "w", (tmp_path / "given", tmp_path / "home"))).listing()
    assert len(listed["bases"]) > 1 and json.dumps(listed, ensure_ascii=False).encode()


def test_only_what_was_listed_is_taken(bases, tmp_path):
    with pytest.raises(UserError, match="open the list again"):
        bases.take(TEXT, "0" * 16)
    known = ids(bases)
    for wrong in (str(tmp_path), "../x", ""):
        with pytest.raises(UserError, match="open the list again"):
            bases.take(TEXT, wrong)
    with pytest.raises(UserError, match="not valid TOML"):
        bases.take("x = =", known["tiny"])
