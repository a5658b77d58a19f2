"""A captioner named by hub id comes once, whole, and without what it does not need."""

import pytest

from tests import models_caption
from tests.small_hub import REPO, serve
from trainer.caption import models
from trainer.errors import UserError


@pytest.fixture
def small_hub(tmp_path, monkeypatch):
    with serve(tmp_path / "repository", tmp_path / "cache", monkeypatch) as server:
        yield server


def test_a_model_is_downloaded_once_and_what_came_is_found_without_the_hub(small_hub):
    models_caption.blip(small_hub.folder)
    (small_hub.folder / "pytorch_model.bin").write_bytes(b"not wanted")
    seen = []
    folder = models.find(REPO, seen.append)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "model_index.json", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json"}
    assert seen[-1].done == seen[-1].of > 0
    small_hub.refuse["/"] = (503, "")
    assert models.find(REPO, seen.append) == folder


def test_a_download_that_was_cut_off_goes_on(small_hub):
    models_caption.blip(small_hub.folder)
    small_hub.refuse["model.safetensors"] = (403, "")
    with pytest.raises(UserError):
        models.find(REPO, lambda progress: None)
    small_hub.refuse.clear()
    assert (models.find(REPO, lambda progress: None) / "model.safetensors").is_file()


def test_a_tagger_is_its_two_files(small_hub):
    models_caption.tagger(small_hub.folder)
    folder = models.find(REPO, lambda progress: None)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "selected_tags.csv"}


def test_a_repository_without_a_captioner_is_refused_before_any_download(small_hub):
    with pytest.raises(UserError, match="someone/tiny on the hub has no .safetensors weights with a config.json"):
        models.find(REPO, lambda progress: None)
    assert not any("/resolve/" in path for path in small_hub.asked)


def test_a_file_is_told_from_its_folder(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a file; give the folder that it is in"):
        models.find(str(file), lambda progress: None)
