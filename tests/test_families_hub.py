"""Bases by hub id: from the cache without a network, else downloaded from a hub (here a small one of our own)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.hf_api import RepoSibling

from tests import models
from trainer.errors import UserError
from trainer.families import hub, sd15

COMMIT = "1" * 40
REPO = "someone/tiny"
EXTRA = ["README.md", "tiny.safetensors", "unet/diffusion_pytorch_model.bin"]  # in the repository, not to be fetched


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download needs, over the files of `folder`."""

    folder: Path
    answers: dict[str, int | str] = {}

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0].removeprefix("/api/models")
        if "error" in self.server.state:
            status, code = self.server.state["error"]
            return self.reply(status, b"{}", body, {"X-Error-Code": code})
        if self.path.startswith("/api/"):
            if "/tree/" in path:
                return self.reply(200, json.dumps(self.tree()).encode(), body)
            siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in self.tree()]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self.reply(200, json.dumps(info).encode(), body)
        file = self.server.folder / path.partition(f"/resolve/{COMMIT}/")[2]
        content = file.read_bytes()
        self.reply(200, content, body, {"ETag": f'"{self.oid(file)}"', "X-Repo-Commit": COMMIT})

    def oid(self, file):
        return f"{abs(hash(str(file))):040x}"[:40]

    def tree(self):
        files = [file for file in sorted(self.server.folder.rglob("*")) if file.is_file()]
        return [
            {"type": "file", "path": str(file.relative_to(self.server.folder)), "size": file.stat().st_size,
             "oid": self.oid(file)}
            for file in files
        ]  # fmt: skip

    def reply(self, status, content, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def small_hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = models.sd15_folder(tmp_path / "repository", "v_prediction")
    server.asked, server.state = [], {}
    for name in EXTRA:
        (server.folder / name).write_bytes(b"not wanted")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_once_and_then_found_without_the_hub(small_hub, tmp_path, capsys):
    base = sd15.open_base(REPO)
    assert base.name == REPO and base.prediction_type == "v_prediction"
    assert "Downloading someone/tiny: 0.0 GB" in capsys.readouterr().out
    fetched = {str(file.relative_to(base.path)) for file in base.path.rglob("*") if file.is_file()}
    assert not fetched & set(EXTRA) and "tokenizer/tokenizer.json" in fetched
    small_hub.asked.clear()
    again = sd15.open_base(REPO)
    assert again.denoiser_id == base.denoiser_id and not small_hub.asked


def test_a_tokenizer_can_come_from_the_hub_by_itself(small_hub, tmp_path):
    file = models.sd15_file(tmp_path / "tiny.safetensors", small_hub.folder)
    with pytest.raises(UserError, match="someone/tiny on the hub has no tokenizer at its top"):
        sd15.open_base(str(file), tokenizer=REPO)
    small_hub.folder = small_hub.folder / "tokenizer"
    base = sd15.open_base(str(file), tokenizer=REPO)
    assert len(sd15.load_text_encoder(base, "cpu", torch.float32).tokenizer) == 514
    small_hub.asked.clear()
    assert sd15.open_base(str(file), tokenizer=REPO).tokenizer == base.tokenizer and not small_hub.asked


def test_a_download_that_was_cut_off_is_completed(small_hub):
    path = sd15.open_base(REPO).path
    weights = path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    assert sd15.open_base(REPO).params["vae"] and weights.exists()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "someone/tiny is gated: accept its terms on https://huggingface.co/someone/tiny"),
        (404, "RepoNotFound", "there is no folder or file someone/tiny here, and no model of that name on the hub"),
        (401, "RepoNotFound", "no model of that name on the hub"),
        (500, "", "someone/tiny is not on this machine, and the hub cannot be reached"),
    ],
)
def test_a_hub_that_refuses_is_explained(small_hub, status, code, message):
    small_hub.state["error"] = status, code
    with pytest.raises(UserError, match=message):
        sd15.open_base(REPO)


def test_no_network_is_explained(small_hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="not on this machine, and the hub cannot be reached.*Check the connection"):
        sd15.open_base(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not on this machine, and the hub cannot be reached.*offline"):
        sd15.open_base(REPO)


def test_a_repository_without_safetensors_is_explained(small_hub):
    for file in small_hub.folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="has no diffusers folders with .safetensors weights"):
        sd15.open_base(REPO)


def test_too_little_room_is_told_before_the_download(small_hub, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e6))
    with pytest.raises(UserError, match=r"someone/tiny needs 0.0 GB, and .* has 0.0 GB free"):
        sd15.open_base(REPO)
    assert not any("/resolve/" in path for path in small_hub.asked)


@pytest.mark.parametrize(
    ("base", "expected"),
    [("someone/model", True), ("a/b/c", False), ("model", False), ("x/y.safetensors", False), ("../up", False)],
)
def test_what_can_be_a_hub_id(base, expected):
    assert hub.is_hub_id(base) == expected


def test_a_folder_on_the_disk_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    assert not hub.is_hub_id("models/mine")


def test_the_smaller_weights_and_all_configs_are_chosen():
    names = ["model_index.json", "unet/config.json", "unet/m.safetensors", "unet/m.fp16.safetensors", "unet/m.bin",
             "unet/m.non_ema.safetensors", "vae/config.json", "vae/m.safetensors", "safety_checker/m.safetensors",
             "tokenizer/merges.txt"]  # fmt: skip
    chosen = [
        file.rfilename for file in hub.choose([RepoSibling(name) for name in names], ["unet", "vae", "tokenizer"])
    ]
    assert sorted(chosen) == sorted(set(names) - {"unet/m.safetensors", "unet/m.bin", "unet/m.non_ema.safetensors",
                                                  "safety_checker/m.safetensors"})  # fmt: skip
