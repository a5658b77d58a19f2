"""A small hub of our own: as much of the Hugging Face hub's API as a download needs, over the files of a folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests import models

COMMIT = "1" * 40
REPO = "someone/tiny"
EXTRA = ["README.md", "tiny.safetensors", "unet/diffusion_pytorch_model.bin",  # in the repository, not to be fetched
         "vae/flax_model.msgpack", "text_encoder/model.onnx"]


class Hub(ThreadingHTTPServer):
    """Serves `folder`; `asked` has the paths of all requests, `refuse` a status and code for those whose path it is in,
    and `pause` the seconds after each megabyte."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.pause = folder, [], 0.0
        self.refuse: dict[str, tuple[int, str]] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.asked.append(self.path)
        for part, (status, code) in self.server.refuse.items():
            if part in self.path:
                return self.reply(status, b"{}", body, {"X-Error-Code": code})
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": str(file.relative_to(self.server.folder)), "size": file.stat().st_size}
                        for file in sorted(self.server.folder.rglob("*")) if file.is_file()]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self.reply(200, json.dumps(info).encode(), body)
        file = self.server.folder / self.path.partition("?")[0].partition("/resolve/main/")[2]
        content, etag = file.read_bytes(), f"{abs(hash(str(file))):040x}"[:40]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self.reply(206 if first else 200, content[first:], body, headers)

    def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content) if body else 0, 1 << 20):
            self.wfile.write(content[start : start + (1 << 20)])
            time.sleep(self.server.pause)


@contextmanager
def serve(folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub talks to in this block, holding a tiny SD 1.5; it downloads to `cache`."""
    server = Hub(models.sd15_folder(folder, "v_prediction"))
    for name in EXTRA:
        (server.folder / name).write_bytes(b"not wanted")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
