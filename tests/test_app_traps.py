"""Traps of the library below the app, each of which would cost an evening: what is served, to whom, and from what."""

import json
import re

import pytest

from app import ui
from app.components import OwnComponent
from app.jobs import Jobs
from app.paths import Places
from tests.test_app_ui import fetch
from trainer import run

# What everybody may see: the login and who is signed in, scripts and styles of the library, the names of its routes
PUBLIC = ("/", "/login", "/logout", "/static/", "/assets/", "/svelte/", "/favicon.ico", "/theme.css", "/robots.txt",
          "/pwa_icon", "/manifest.json", "/openapi.json", "/gradio_api/login", "/gradio_api/user", "/gradio_api/token",
          "/gradio_api/app_id", "/gradio_api/runs", "/gradio_api/theme.css", "/gradio_api/startup-events",
          "/gradio_api/heartbeat/")  # the heartbeat never ends, and says only that the server lives
REFUSED = (401, 403, 404, 422)
DRAWN = {"html", "tabs", "tabitem", "row", "column", "form", "group"}


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """The app behind a password, with something in its workspace."""
    workspace = tmp_path_factory.mktemp("w")
    ours = run.create(workspace, "secret-run", "version = 1\n")
    ours.samples.mkdir()
    jobs = Jobs(Places(workspace))
    jobs.places.hand_out(ours)
    page, address, _ = ui.launch(jobs, host="127.0.0.1", port=None, password="correct horse battery")
    yield page, address.rstrip("/")
    page.close(verbose=False)


def is_public(path):
    return any(path == one or one != "/" and path.startswith(one) for one in PUBLIC)


def test_without_the_password_every_route_is_shut(closed):
    _, address = closed
    shut = 0
    for path, methods in json.loads(fetch(f"{address}/openapi.json")[1])["paths"].items():
        path = re.sub(r"\{[^}]*\}", "x", path)
        for method in ("GET", "POST"):
            if method.lower() not in methods or is_public(path):
                continue
            status, body = fetch(f"{address}{path}", {} if method == "POST" else None)
            assert status in REFUSED and b"secret-run" not in body, (method, path, status)
            shut += status == 401
    assert shut > 20


def test_what_everybody_may_see_tells_nothing_of_the_workspace(closed):
    page, address = closed
    for path in ("/", "/openapi.json", "/manifest.json", "/theme.css", "/gradio_api/runs", "/gradio_api/token",
                 "/gradio_api/app_id", "/gradio_api/startup-events"):
        status, body = fetch(f"{address}{path}")
        assert status == 200 and b"secret-run" not in body and str(page.temp_file_sets).encode() not in body


def test_hidden_files_and_spelled_out_dots_are_not_served(tmp_path):
    ours = run.create(tmp_path, "a", "version = 1\n")
    ours.samples.mkdir()
    (ours.samples / "a.png").write_bytes(b"picture")
    (ours.path / ".hidden").write_text("secret")
    jobs = Jobs(Places(tmp_path))
    jobs.places.hand_out(ours)
    page, address, _ = ui.launch(jobs, host="127.0.0.1", port=None)
    try:
        get = lambda path: fetch(f"{address.rstrip('/')}/gradio_api/file={path}")  # noqa: E731
        assert get(ours.samples / "a.png") == (200, b"picture")
        for path in ("../.hidden", "%2e%2e/.hidden", "../events.jsonl", "%2e%2e/trainer.log",
                     "..%2fpreset.toml", "%2e%2e%2fpreset.toml", "..%5cpreset.toml", "a.png/../../preset.toml",
                     "x/%2e%2e/%2e%2e/preset.toml", "%252e%252e/preset.toml"):
            assert get(f"{ours.samples}/{path}")[0] in (400, 403, 404), path
    finally:
        page.close(verbose=False)


def test_the_page_is_made_of_our_own_components_alone(tmp_path):
    """Theirs freeze a value at the start, are drawn read-only unless an event takes them, or copy any path into a
    public folder; and a template's scripts are never run."""
    page = ui.build(Jobs(Places(tmp_path)))
    assert {block.get_block_name() for block in page.blocks.values()} <= DRAWN
    own = [block for block in page.blocks.values() if block.get_block_name() == "html"]
    assert own and all(isinstance(block, OwnComponent) for block in own)
    for block in own:
        assert "<script" not in block.html_template and block.apply_default_css is False
        names = [function.__name__ for function in block.server_fns]
        assert len(names) == len(set(names))


def test_uploads_are_cleaned_up_and_several_requests_are_answered_at_once(tmp_path):
    page = ui.build(Jobs(Places(tmp_path)))
    assert page.delete_cache == (3600, 86400)
    assert page.default_config and page._queue.default_concurrency_limit == 8
