"""Thumbnails are made elsewhere, in the order of need, and what is known of images outlives the app."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from app.datasets import facts, thumbnails
from app.datasets.facts import Facts
from app.datasets.thumbnails import LATER, SOON, FactsFile, Workshop
from tests.data_sets import draw, wait_for

ROOT = Path(__file__).parent.parent


@pytest.fixture
def workshop(tmp_path):
    made = Workshop(tmp_path / "thumbnails", workers=1)
    yield made
    made.close()


def stamp(path):
    return path.stat().st_mtime_ns, path.stat().st_size


def make(workshop, *paths, urgency=LATER):
    """The facts of the images, in the order in which they were found."""
    found, lock = [], threading.Lock()

    def done(path, told):
        with lock:
            found.append((path.name, told))

    for path in paths:
        workshop.want(path, stamp(path), lambda told, path=path: done(path, told), urgency)
    wait_for(lambda: len(found) == len(paths))
    return found


def test_a_thumbnail_is_small_upright_and_keyed_by_the_files_state(workshop, tmp_path):
    path = draw(tmp_path / "a.png", (1000, 500))
    [(_, told)] = make(workshop, path)
    file = workshop.file_of(path, stamp(path))
    assert Image.open(file).size == (320, 160) and (told.width, told.height, told.trouble) == (1000, 500, "")
    draw(path, (500, 1000), seed=2)
    assert not workshop.file_of(path, stamp(path)).exists() and workshop.file_of(path, stamp(path)) != file


def test_a_small_image_is_not_enlarged(workshop, tmp_path):
    path = draw(tmp_path / "a.png", (32, 24))
    make(workshop, path)
    assert Image.open(workshop.file_of(path, stamp(path))).size == (32, 24)


def test_what_is_looked_at_comes_before_all_the_rest(workshop, tmp_path):
    paths = [draw(tmp_path / f"{i}.jpg", (900, 900), seed=i) for i in range(30)]
    order = []
    for path in paths:
        workshop.want(path, stamp(path), lambda told, path=path: order.append(path.name))
    workshop.want(paths[-1], stamp(paths[-1]), lambda told: order.append(paths[-1].name), SOON)
    wait_for(lambda: len(order) == 30)
    assert order.index("29.jpg") < 15 and len(set(order)) == 30  # and no image twice


def test_asking_takes_no_time(workshop, tmp_path):
    path = draw(tmp_path / "a.jpg", (2000, 2000))
    began = time.monotonic()
    for i in range(1000):
        workshop.want(path.with_name(f"{i}.jpg"), (i, i), lambda told: None)
    assert time.monotonic() - began < 1


def test_broken_images_have_their_reason_and_stop_nobody(workshop, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "x.heic").write_bytes(b"?")
    good = draw(tmp_path / "good.png")
    told = dict(make(workshop, tmp_path / "broken.png", tmp_path / "empty.jpg", tmp_path / "x.heic", good))
    assert "not an image" in told["broken.png"].trouble and told["empty.jpg"].trouble == "the file is empty"
    assert "HEIC files are not read" in told["x.heic"].trouble and not told["good.png"].trouble


def dying(monkeypatch, times):
    """The first workers die of what they are asked."""
    killer = "import sys, os\nline = sys.stdin.readline()\nos.abort()"
    real, started = thumbnails._start, []

    def start():
        started.append(True)
        return real() if len(started) > times else subprocess.Popen(
            [sys.executable, "-c", killer], text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)

    monkeypatch.setattr(thumbnails, "_start", start)


def test_a_file_that_takes_its_reader_down_is_told_and_the_next_one_is_made(workshop, tmp_path, monkeypatch):
    dying(monkeypatch, times=2)
    told = dict(make(workshop, draw(tmp_path / "a.png"), draw(tmp_path / "b.png", seed=2)))
    assert "ends the program that reads it" in told["a.png"].trouble and not told["b.png"].trouble
    assert told["a.png"].passing


def test_a_reader_that_dies_once_says_nothing_of_the_image(workshop, tmp_path, monkeypatch):
    dying(monkeypatch, times=1)
    [(_, told)] = make(workshop, draw(tmp_path / "a.png"))
    assert (told.trouble, told.width) == ("", 32)


def test_a_worker_that_cannot_be_started_is_tried_again(workshop, tmp_path, monkeypatch):
    real, failed = thumbnails._start, []

    def start():
        if len(failed) < 3:
            failed.append(True)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()

    monkeypatch.setattr(thumbnails, "_start", start)
    monkeypatch.setattr(thumbnails, "PAUSE", 0.01)
    told = make(workshop, draw(tmp_path / "a.png"), draw(tmp_path / "b.png", seed=2))
    assert [(name, facts.trouble) for name, facts in told] == [("a.png", ""), ("b.png", "")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_a_fault_ends_is_replaced(workshop, tmp_path):
    ended = threading.Event()

    def fail(told):
        ended.set()
        raise RuntimeError("a fault of whoever wanted it")

    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    workshop.want(paths[0], stamp(paths[0]), fail)
    workshop.want(paths[1], stamp(paths[1]), lambda told: None)  # waits when the thread ends
    assert ended.wait(30)
    wait_for(lambda: workshop._threads == 0)
    workshop.want(paths[1], stamp(paths[1]), lambda told: None)
    wait_for(lambda: workshop.file_of(paths[1], stamp(paths[1])).exists())


@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes are other things there")
def test_an_interrupt_of_the_app_does_not_reach_the_workers():
    worker = thumbnails._start()
    assert os.getpgid(worker.pid) != os.getpgid(0)
    worker.communicate()


def test_a_trouble_that_may_pass_is_looked_at_again_after_a_restart(tmp_path):
    told = facts.look(tmp_path / "none.png", tmp_path / "t.webp")
    kept = FactsFile(tmp_path / "facts.jsonl")
    kept.put("none.png", (1, 2), told)
    kept.put("bad.png", (1, 2), Facts(trouble="broken: no end"))
    assert told.trouble.startswith("cannot be read") and kept.get("none.png", (1, 2)) == told
    again = FactsFile(kept.path)
    assert again.get("none.png", (1, 2)) is None and again.get("bad.png", (1, 2)).trouble == "broken: no end"


def test_a_full_disk_says_nothing_of_an_image(tmp_path):
    path = draw(tmp_path / "a.png")
    (tmp_path / "file").touch()
    asked = {"path": str(path), "thumbnail": str(tmp_path / "file" / "x.webp"), "side": 320}
    done = subprocess.run([sys.executable, "-m", "app.datasets.facts"], cwd=ROOT, input=json.dumps(asked) + "\n",
                          capture_output=True, text=True)
    assert json.loads(done.stdout).keys() == {"failed"}


def test_the_worker_is_light_and_ends_with_its_input():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "app.datasets.facts"], cwd=ROOT, input="",
                          capture_output=True, text=True)
    assert done.returncode == 0 and "torch" not in done.stderr and "gradio" not in done.stderr


def test_images_that_look_alike_have_near_hashes_and_others_have_not(tmp_path):
    def bits(one, other):
        return (int(one.hash, 16) ^ int(other.hash, 16)).bit_count()

    drawn = [draw(tmp_path / "a.png", (640, 480), 1), draw(tmp_path / "b.jpg", (320, 240), 1, quality=50),
             draw(tmp_path / "c.png", (640, 480), 2)]
    looks = [facts.look(path, tmp_path / "t.webp") for path in drawn]
    assert bits(looks[0], looks[1]) <= 4 and bits(looks[0], looks[2]) > 16


def test_what_is_known_outlives_the_app_and_torn_lines_cost_only_themselves(tmp_path):
    kept = FactsFile(tmp_path / "deep" / "facts.jsonl")
    kept.put("ä.png", (1, 2), Facts(width=3, height=4))
    kept.put("b.png", (1, 2), Facts(trouble="broken"))
    with open(kept.path, "ab") as file:
        file.write(b'["c.png",1,2,{"wid')
    again = FactsFile(kept.path)
    assert again.get("ä.png", (1, 2)) == Facts(width=3, height=4) and again.get("ä.png", (1, 3)) is None
    assert again.get("b.png", (1, 2)).trouble == "broken" and again.get("c.png", (1, 2)) is None
    again.put("d.png", (1, 2), Facts(width=9))  # behind the torn line
    assert FactsFile(kept.path).get("ä.png", (1, 2)).width == 3


def test_facts_of_files_that_changed_often_are_written_anew(tmp_path):
    kept = FactsFile(tmp_path / "facts.jsonl")
    for i in range(1200):
        kept.put("a.png", (i, 1), Facts(width=i))
    assert FactsFile(kept.path).get("a.png", (1199, 1)).width == 1199
    assert len(kept.path.read_bytes().splitlines()) == 1
