"""`python -m app` as a person starts it: light, private, and closed with a password when it is not."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from app import __main__ as app
from trainer.queue import Queue

ROOT = Path(__file__).parent.parent


def options(*arguments):
    return app.options(list(arguments))


def test_it_listens_to_this_machine_only_and_asks_for_no_password():
    chosen = options()
    assert chosen.host == "127.0.0.1" and app.password_for(chosen) is None


@pytest.mark.parametrize("arguments", [["--listen"], ["--share"], ["--host", "0.0.0.0"], ["--host", "192.168.0.3"]])
def test_whatever_others_can_reach_gets_a_password(arguments):
    made = {app.password_for(options(*arguments)) for _ in range(3)}
    assert len(made) == 3 and all(len(password) >= 20 for password in made)
    assert app.password_for(options(*arguments, "--password", "twelve-letters")) == "twelve-letters"


@pytest.mark.parametrize("password", ["", "short", "eleven-char"])
def test_a_short_password_is_refused(password):
    with pytest.raises(SystemExit, match="at least 12 characters"):
        app.password_for(options("--listen", "--password", password))


def test_a_failed_share_says_how_to_reach_the_app_by_ssh(capsys):
    app.announce("http://127.0.0.1:7860/", None, "secret-secret", "studio", wanted_public=True)
    said = capsys.readouterr().out
    assert "ssh -L 7860:127.0.0.1:7860" in said and "Password: secret-secret" in said


def test_roots_may_be_given_several_times_and_must_be_there(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert app.roots_of(options()) == ()
    assert app.roots_of(options("--root", "a", "--root", str(tmp_path), "--root", "a/")) == (tmp_path / "a", tmp_path)
    with pytest.raises(SystemExit, match="--root: .*none is not a folder; give one that holds data sets"):
        app.roots_of(options("--root", "none"))
    assert app.models_of(options("--models", "a", "--models", "a/")) == (tmp_path / "a",)
    with pytest.raises(SystemExit, match="--models: .*none is not a folder; give one that holds base models"):
        app.models_of(options("--models", "none"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments):
    """The app, which takes an interrupt even where the suite itself runs in the background and ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here would be ignored there
    try:
        return subprocess.Popen([sys.executable, "-m", "app", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.timed
def test_a_start_is_light_answers_and_ends_on_interrupt(tmp_path):
    port = free_port()
    process = start("--port", str(port), "--workspace", str(tmp_path / "w"))
    try:
        assert process.stdout.readline().strip() == f"Stiefel Studio: http://127.0.0.1:{port}/"
        begun = time.monotonic()
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read().decode()
        assert "Stiefel Studio" in page and time.monotonic() - begun < 2
        seen = psutil.Process(process.pid)
        assert seen.memory_info().rss < 250e6
        assert not [found.path for found in seen.memory_maps() if re.search(r"/torch/|libtorch", found.path)]
        assert (tmp_path / "w").is_dir()
    finally:
        process.send_signal(signal.SIGINT)
    assert "Trainings go on" in process.communicate(timeout=30)[0]
    assert process.returncode == 0


def test_a_port_that_is_taken_is_told_in_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start("--port", str(taken.getsockname()[1]), "--workspace", str(tmp_path))
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "The app could not start" in said and "Traceback" not in said


def test_nothing_is_sent_home_and_files_stay_in_the_workspace(tmp_path):
    program = ("import os, sys; sys.argv = ['app']; from app import __main__ as app, ui\n"
               "names = ['GRADIO_ANALYTICS_ENABLED', 'GRADIO_TEMP_DIR']\n"
               "ui.launch = lambda *a, **k: sys.exit(' '.join(os.environ[name] for name in names))\n"
               f"app.serve(app.options(['--workspace', {str(tmp_path)!r}]))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == f"False {tmp_path / 'cache' / 'gradio'}"


def test_a_start_takes_up_the_queue_and_the_queue_needs_the_app_no_more(tmp_path):
    """As after a restart of the machine."""
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "0001-a.toml").write_text("[model]\nfamly = 1\n")  # what fails needs no model
    program = ("import sys; from app import __main__ as app, ui\n"
               f"ui.launch = lambda *a, **k: sys.exit()\napp.serve(app.options(['--workspace', {str(tmp_path)!r}]))")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
    queue, end = Queue(tmp_path), time.monotonic() + 60
    while not queue.failures() or queue.is_served():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "model.famly: no such key" in queue.failures()[0].reason
