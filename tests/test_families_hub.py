"""Bases by hub id: from the cache without a network, else downloaded from a hub (here a small one of our own)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.hf_api import RepoSibling

from tests import models
from tests.small_hub import EXTRA, REPO, serve
from trainer.errors import UserError
from trainer.families import hub, sd15

FOLDERS = [*sd15.PARTS, "tokenizer", "scheduler"]


@pytest.fixture
def small_hub(tmp_path, monkeypatch):
    with serve(tmp_path / "repository", tmp_path / "cache", monkeypatch) as server:
        yield server


def fetched() -> list[hub.Progress]:
    return list(hub.fetch(hub.plan(REPO, FOLDERS)))


def wanted(server) -> set[str]:
    return {str(file.relative_to(server.folder)) for file in server.folder.rglob("*") if file.is_file()} - set(EXTRA)


def test_a_model_is_downloaded_once_and_then_found_without_the_hub(small_hub):
    with pytest.raises(UserError, match="someone/tiny was not downloaded yet"):
        sd15.open_base(REPO)
    fetched()
    base = sd15.open_base(REPO)
    assert base.name == REPO and base.prediction_type == "v_prediction"
    files = {str(file.relative_to(base.path)) for file in base.path.rglob("*") if file.is_file()}
    assert not files & set(EXTRA) and "tokenizer/tokenizer.json" in files
    small_hub.asked.clear()
    assert sd15.open_base(REPO).denoiser_id == base.denoiser_id and not small_hub.asked
    assert hub.plan(REPO, FOLDERS).files == ()


def test_the_plan_has_the_size_of_what_is_missing_and_small_files_first(small_hub):
    plan = hub.plan(REPO, FOLDERS)
    assert {name for name, _ in plan.files} == wanted(small_hub)
    assert plan.bytes == sum((small_hub.folder / name).stat().st_size for name, _ in plan.files)
    assert [size for _, size in plan.files] == sorted(size for _, size in plan.files)
    assert not any("/resolve/" in path for path in small_hub.asked)  # nothing of them was fetched
    assert {name.split("/")[0] for name, _ in hub.plan(REPO, ["vae"]).files} == {"model_index.json", "vae"}


def test_progress_rises_to_the_whole_and_says_file_and_speed(small_hub, monkeypatch):
    small_hub.pause = 0.05
    monkeypatch.setattr(hub, "_LOOK", 0.02)
    seen = fetched()
    done = [progress.done for progress in seen]
    assert done == sorted(done) and done[-1] == seen[-1].of > 1e6 and any(0 < part < done[-1] for part in done)
    assert 1 <= seen[0].file < seen[-1].file == seen[-1].files == len(wanted(small_hub))
    assert max(progress.speed for progress in seen) > 1e5


def test_a_tokenizer_can_come_from_the_hub_by_itself(small_hub, tmp_path):
    file = models.sd15_file(tmp_path / "tiny.safetensors", small_hub.folder)
    with pytest.raises(UserError, match="someone/tiny on the hub has no tokenizer at its top"):
        hub.plan_tokenizer(REPO)
    small_hub.folder = small_hub.folder / "tokenizer"
    with pytest.raises(UserError, match="someone/tiny was not downloaded yet"):
        sd15.open_base(str(file), tokenizer=REPO)
    list(hub.fetch(hub.plan_tokenizer(REPO)))
    small_hub.asked.clear()
    base = sd15.open_base(str(file), tokenizer=REPO)
    assert len(sd15.load_text_encoder(base, "cpu", torch.float32).tokenizer) == 514 and not small_hub.asked


def test_a_download_that_was_cut_off_goes_on_where_it_was(small_hub, tmp_path):
    fetched()
    weights = sd15.open_base(REPO).path / "vae" / "diffusion_pytorch_model.safetensors"
    blob = weights.resolve()
    content = blob.read_bytes()
    weights.unlink()
    blob.unlink()
    blob.with_name(f"{blob.name}.incomplete").write_bytes(content[:1000])
    small_hub.asked.clear()
    seen = fetched()
    assert seen[-1].done == seen[-1].of == len(content) and weights.read_bytes() == content
    assert {path.rpartition("/")[2] for path in small_hub.asked if "/resolve/" in path} == {weights.name}


@pytest.mark.parametrize(
    ("where", "status", "code", "message"),
    [
        ("", 403, "GatedRepo", "someone/tiny is gated: accept its terms on https://huggingface.co/someone/tiny, then "
                               "log in here with `hf auth login`, or set HF_TOKEN"),
        ("/resolve/", 401, "GatedRepo", "someone/tiny is gated: accept its terms"),  # the list of files is public
        ("", 404, "RepoNotFound", "there is no folder or file someone/tiny here, and no model of that name on the hub"),
        ("", 401, "RepoNotFound", "no model of that name on the hub"),
        ("", 500, "", "someone/tiny is not on this machine, and the hub cannot be reached"),
        ("/resolve/", 400, "", "someone/tiny is not on this machine, and the hub cannot be reached"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses_is_explained(small_hub, where, status, code, message):
    small_hub.refuse[where] = status, code
    with pytest.raises(UserError, match=message):
        fetched()


def test_no_network_is_explained(small_hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="not on this machine, and the hub cannot be reached.*Check the connection"):
        fetched()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not on this machine, and the hub cannot be reached.*offline"):
        fetched()


@pytest.mark.parametrize("gone", ["model_index.json", "*/*.safetensors"])
def test_a_repository_without_diffusers_folders_is_explained(small_hub, gone):
    for file in small_hub.folder.glob(gone):
        file.unlink()
    with pytest.raises(UserError, match="has no diffusers folders with .safetensors weights"):
        fetched()


def test_too_little_room_is_told(monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e9))
    hub.check_room(hub.Plan(REPO, (("a", 900_000_000),)))
    with pytest.raises(UserError, match=r"tiny needs 8.1 GB, and .* has 1.0 GB free: make room, or set HF_HOME"):
        hub.check_room(hub.Plan(REPO, (("a", 100_000_000), ("b", 8_000_000_000))))


@pytest.mark.parametrize(
    ("base", "expected"),
    [("someone/model", True), ("a/b/c", False), ("model", False), ("x/y.safetensors", False), ("x/y.gguf", False),
     ("../up", False)],
)  # fmt: skip
def test_what_can_be_a_hub_id(base, expected):
    assert hub.is_hub_id(base) == expected


def test_a_folder_on_the_disk_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    assert not hub.is_hub_id("models/mine")


def chosen(names, folders):
    return {file.rfilename for file in hub.choose([RepoSibling(name) for name in names], folders)}


def test_the_smaller_weights_and_all_configs_are_chosen():
    names = {"model_index.json", "unet/config.json", "unet/m.safetensors", "unet/m.fp16.safetensors", "unet/m.bin",
             "unet/m.non_ema.safetensors", "unet/model.onnx", "vae/config.json", "vae/m.safetensors",
             "vae/flax_model.msgpack", "safety_checker/m.safetensors", "tokenizer/merges.txt", "top.safetensors"}
    assert chosen(names, ["unet", "vae", "tokenizer"]) == names - {
        "unet/m.safetensors", "unet/m.bin", "unet/m.non_ema.safetensors", "unet/model.onnx", "vae/flax_model.msgpack",
        "safety_checker/m.safetensors", "top.safetensors"}


def test_shards_come_with_their_own_index_alone():
    half = {"t/config.json", "t/m.fp16.safetensors"}
    whole = {"t/m-00001-of-00002.safetensors", "t/m-00002-of-00002.safetensors", "t/m.safetensors.index.json"}
    pickled = {"t/pytorch_model.bin.index.json", "t/pytorch_model-00001-of-00002.bin"}
    assert chosen(half | whole | pickled, ["t"]) == half
    assert chosen({"t/config.json"} | whole | pickled, ["t"]) == {"t/config.json"} | whole
