"""The wiring: the page as the web server gives it, its functions over HTTP, and which files it hands out."""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client

from app import ui
from app.datasets.library import Library
from app.jobs import Jobs
from app.paths import Places
from trainer import run
from trainer.events import EventWriter

STAND_IN = (sys.executable, str(Path(__file__).parent / "app_trainer.py"))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    ours = run.create(workspace, "a", "version = 1\n")
    ours.samples.mkdir()
    (ours.samples / "000000_00.png").write_bytes(b"picture")
    ours.result.write_bytes(b"weights")
    ours.log.write_text("secret")
    os.symlink(ours.log, ours.samples / "link.png")
    os.symlink(ours.path, ours.samples / "up")
    events = EventWriter(ours.events)
    events.write("start", step=0, steps=2)
    events.write("sample", step=0, images=["samples/000000_00.png"], prompts=["a"], seed=1)
    page, address, _ = ui.launch(Jobs(Places(workspace), STAND_IN), host="127.0.0.1", port=None)
    yield address.rstrip("/"), ours, page
    page.close(verbose=False)


def fetch(address, data=None, cookie=None):
    headers = {"Content-Type": "application/json"} | ({"Cookie": cookie} if cookie else {})
    body = json.dumps(data).encode() if data is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def call(address, function, data, page):
    """As the page does it: components are addressed by number."""
    number = next(number for number, block in page.blocks.items() if hasattr(block, "server_fns")
                  and function in [item.__name__ for item in block.server_fns])
    return fetch(f"{address}/gradio_api/component_server",
                 {"data": data, "component_id": number, "fn_name": function, "session_hash": "x"})


def test_the_library_is_closed_when_the_app_ends(tmp_path, monkeypatch):
    at_end = []
    monkeypatch.setattr("atexit.register", lambda call, *_, **__: at_end.append(call))
    ui.build(Jobs(Places(tmp_path), STAND_IN))
    [close] = [call for call in at_end if isinstance(getattr(call, "__self__", None), Library)]
    close()
    assert not close.__self__.workshop._is_open


def test_a_page_calls_the_servers_functions(app):
    address, ours, page = app
    status, body = call(address, "read_run", {"run": "a"}, page)
    answer = json.loads(body)
    assert status == 200 and answer["samples"][0]["cells"] == [["a", "samples/000000_00.png", 1]]
    assert json.loads(call(address, "list_runs", {}, page)[1])["rows"][0][0] == "a"
    assert "error" in json.loads(call(address, "read_run", {"run": "../a"}, page)[1])


def test_pictures_and_results_are_served_and_nothing_else_of_a_run(app):
    address, ours, page = app
    call(address, "read_run", {"run": "a"}, page)
    get = lambda path: fetch(f"{address}/gradio_api/file={path}")  # noqa: E731
    assert get(ours.samples / "000000_00.png") == (200, b"picture")
    assert get(ours.result) == (200, b"weights")
    here = Path(__file__).parent.parent
    for path in (ours.preset, ours.log, ours.events, ours.path, ours.samples, f"{ours.samples}/../trainer.log",
                 f"{ours.samples}/%2e%2e/trainer.log", f"{ours.samples}/..%2ftrainer.log", ours.samples / "link.png",
                 ours.samples / "up/trainer.log", "/etc/passwd", here / "app/ui.py", here / "requirements.txt",
                 "app/ui.py", f"{ours.result}.log", "http://127.0.0.1/x"):
        assert get(path)[0] in (400, 403, 404), path


def test_nothing_waits_in_a_queue_and_nothing_is_kept_for_a_tab(app):
    """Events, timers and session state each cost an open connection a tab; a browser has six."""
    address, _, page = app
    config = Client(address, verbose=False).config
    assert config["dependencies"] == []
    assert not {"state", "timer", "browserstate"} & {component["type"] for component in config["components"]}


def test_the_page_fetches_nothing_from_elsewhere(app):
    _, body = fetch(app[0])
    text = body.decode()
    assert "fonts.googleapis.com" not in text and "cdn." not in text
    assert "uPlot" in text and "Studio.runView" in text


def test_a_password_guards_page_functions_and_files(tmp_path):
    ours = run.create(tmp_path, "a", "version = 1\n")
    ours.result.write_bytes(b"weights")
    jobs = Jobs(Places(tmp_path), STAND_IN)
    page, address, _ = ui.launch(jobs, host="127.0.0.1", port=None, password="correct horse battery")
    jobs.places.hand_out(ours)
    try:
        address = address.rstrip("/")
        assert fetch(f"{address}/config")[0] == 401
        assert call(address, "read_run", {"run": "a"}, page)[0] == 401
        assert fetch(f"{address}/gradio_api/file={ours.result}")[0] == 401
        form = b"username=studio&password=wrong"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/login", form)
        with urllib.request.urlopen(f"{address}/login", form.replace(b"wrong", b"correct+horse+battery")) as answer:
            cookie = "; ".join(line.split(";")[0] for line in answer.headers.get_all("set-cookie"))
        assert fetch(f"{address}/gradio_api/file={ours.result}", cookie=cookie) == (200, b"weights")
    finally:
        page.close(verbose=False)
