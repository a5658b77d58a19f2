"""Decoders: the same pixels wherever they are made, no more at a time than there is room for, nothing left running."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.data_sets import draw, wait_for
from trainer.data import decoding
from trainer.data.decoding import Decoders, Picture, Wanted, cover_image, picture_of, processes_for

ROOT = Path(__file__).parent.parent


def wanted(path: Path, size: tuple[int, int] = (24, 24), pixels: int = 1) -> Wanted:
    return Wanted(path, hashlib.sha256(path.read_bytes()).hexdigest(), pixels, size)


@pytest.fixture
def files(tmp_path: Path) -> list[Wanted]:
    """One file of each kind of decoder; more of them than a pair of processes takes at a time."""
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 4), dtype=np.uint8)
    made = []
    for number, (name, mode, options) in enumerate([
            ("a.jpg", "RGB", {"quality": 90}), ("b.png", "RGBA", {}), ("c.webp", "RGB", {"quality": 80}),
            ("d.tif", "F", {}), ("é f.jpg", "CMYK", {}), ("f.png", "P", {}), ("g.gif", "L", {})]):
        image = Image.fromarray(noise[..., :4]).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
        image.save(tmp_path / name, **options)
        made.append(wanted(tmp_path / name, (24 + 8 * number, 40)))
    return made


def decoded(files: list[Wanted], processes: int) -> list[Picture | str]:
    with Decoders(processes) as decoders:
        return [str(future.exception()) if future.exception() else future.result()
                for future in decoders.pictures(files)]


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "trainer.data.decoding" in " ".join(child.cmdline())]


def test_processes_make_the_pixels_of_this_one_in_the_order_asked_for(files: list[Wanted]) -> None:
    here = [picture_of(cover_image(image.path, image.sha256, image.size)) for image in files]
    assert decoded(files, 0) == here
    assert decoded(files, 2) == here
    assert not children()


def test_a_broken_image_is_told_as_it_is_here_and_the_others_come(files: list[Wanted]) -> None:
    files[1].path.write_bytes(files[1].path.read_bytes()[:-40])
    files[1] = wanted(files[1].path)
    files[3].path.write_bytes(b"another")
    files[5].path.unlink()
    apart = decoded(files, 2)
    assert apart == decoded(files, 0)
    assert [number for number, found in enumerate(apart) if isinstance(found, str)] == [1, 3, 5]
    assert "changed since" in apart[3] and "No such file" in apart[5]


def test_an_image_whose_process_is_killed_is_decoded_by_another(files: list[Wanted]) -> None:
    here = decoded(files, 0)
    with Decoders(2) as decoders:
        stream = decoders.pictures(files * 3)
        found = [next(stream).result()]
        for child in children():
            child.kill()
        found += [future.result() for future in stream]
    assert found == here * 3


def test_an_image_that_ends_each_process_is_named_and_no_more(files: list[Wanted], monkeypatch) -> None:
    def ask(decoder: decoding.Decoder, image: Wanted, plain=decoding.Decoder.ask) -> Picture | str:
        if image == files[2]:
            decoder.process.kill()
        return plain(decoder, image)

    monkeypatch.setattr(decoding.Decoder, "ask", ask)
    found = decoded(files, 2)
    assert [number for number, one in enumerate(found) if isinstance(one, str)] == [2]
    assert "ends the process" in found[2]


@pytest.mark.skipif(os.name != "posix", reason="/bin/false")
@pytest.mark.parametrize("program", ["/bin/false", "/no/python"])
def test_where_no_process_can_be_started_this_one_decodes(files: list[Wanted], monkeypatch, program: str) -> None:
    here = decoded(files, 0)
    monkeypatch.setattr(sys, "executable", program)
    assert decoded(files, 2) == here


@pytest.mark.parametrize("pixels, most", [(1, 5), (decoding.AHEAD // 3, 3), (2 * decoding.AHEAD, 1)])
def test_no_more_is_on_its_way_than_there_is_room_for(tmp_path: Path, monkeypatch, pixels: int, most: int) -> None:
    asked = []
    monkeypatch.setattr(Decoders, "_make", lambda self, image: asked.append(image))
    image = wanted(draw(tmp_path / "a.png"), pixels=pixels)
    with Decoders(2) as decoders:
        for number, future in enumerate(decoders.pictures([image] * 20)):
            future.result()
            time.sleep(0.001)
            assert len(asked) <= number + most
    assert len(asked) == 20


def test_leaving_in_the_middle_waits_for_nothing_and_leaves_nothing(files: list[Wanted]) -> None:
    with pytest.raises(KeyboardInterrupt), Decoders(2) as decoders:
        next(decoders.pictures(files * 50)).result()
        assert children()
        raise KeyboardInterrupt
    assert not children()


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests were started
from trainer.data.decoding import Decoders
from tests.test_data_decoding import *
with Decoders(2) as decoders:
    for future in decoders.pictures([wanted(Path(sys.argv[1]))] * 10**6):
        future.result()
        print(*(decoder.process.pid for decoder in decoders.started), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_trainer_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(draw(tmp_path / "a.png", (900, 900)))], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while len(pids := program.stdout.readline().split()) < 2:
        pass
    program.send_signal(number)
    program.communicate(timeout=60)
    wait_for(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), 10)


def test_a_process_loads_nothing_that_takes_long() -> None:
    code = "import sys, trainer.data.decoding; print(*{'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == ""


def test_processes_are_started_for_much_work_and_several_cores(tmp_path: Path, monkeypatch) -> None:
    path = draw(tmp_path / "a.png")
    much, little = [wanted(path, pixels=12_000_000)] * 100, [wanted(path, pixels=12_000_000)] * 10
    counts = []
    for cores in (1, 2, 8, 128):
        monkeypatch.setattr(decoding, "usable", lambda cores=cores: cores)
        counts.append((processes_for(much), processes_for(much, sharing=4), processes_for(little)))
    assert counts == [(0, 0, 0), (2, 0, 0), (8, 2, 0), (16, 16, 0)]
