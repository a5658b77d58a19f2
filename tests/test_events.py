"""The event file: what one process writes, kills and full disks included, and what others read of it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.events import EventReader, EventWriter, heal, last_event, newest_events, newest_first, rewind

WRITER = """
import random, sys
from pathlib import Path
from trainer.events import EventWriter, last_event
path = Path(sys.argv[1])
step = (last_event(path) or {}).get("step", 0)
writer = EventWriter(path)
writer.write("start", step=step)
print("started", flush=True)
while True:
    step += 1
    writer.write("step", step=step, text="ä" * random.randrange(2000))
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def lines(*events: dict) -> bytes:
    return b"".join(json.dumps(event, ensure_ascii=False).encode() + b"\n" for event in events)


def step(number: int, **fields: object) -> dict:
    return {"kind": "step", "step": number, **fields}


def test_an_event_is_one_line_of_json_with_its_time(path):
    before = time.time()
    writer = EventWriter(path)
    writer.write("note", step=3, text="line\nbreak\r and “quotes” \u2028 日本")
    writer.write("step", step=4, loss=0.5)
    writer.close()
    first, second = (json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1])
    assert first.pop("t") == pytest.approx(before, abs=5)
    assert first == {"kind": "note", "step": 3, "text": "line\nbreak\r and “quotes” \u2028 日本"}
    assert list(second) == ["t", "kind", "step", "loss"]
    assert "日本".encode() in path.read_bytes()  # readable with `tail -f`


def test_an_event_is_there_for_others_at_once(path):
    writer, reader = EventWriter(path), EventReader(path)
    for number in range(3):
        writer.write("step", step=number)
        assert [event["step"] for event in reader.read()] == [number]
    writer.close()


def test_numbers_that_json_does_not_know_become_null(path):
    writer = EventWriter(path)
    writer.write("rank", loss=math.nan, erank={"a": math.inf, "b": [1.0, -math.inf, (math.nan,)]}, step=1)
    writer.close()
    event = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (event["loss"], event["erank"], event["step"]) == (None, {"a": None, "b": [1.0, None, [None]]}, 1)


def test_a_file_name_that_is_no_utf8_does_not_end_a_run(path):
    writer = EventWriter(path)
    writer.write("skipped", file=os.fsdecode(b"caf\xe9.png"), reason="broken")
    writer.close()
    assert json.loads(path.read_bytes().decode())["file"] == "caf?.png"


@pytest.mark.parametrize("torn", [b'{"kind": "st', "ä".encode()[:1], b"x" * 200_000],
                         ids=["half", "half a letter", "long"])
def test_a_line_torn_by_a_kill_is_cut_off_and_the_next_one_is_whole(path, torn):
    whole = lines(*(step(number) for number in range(50)))
    path.write_bytes(whole + torn)
    writer = EventWriter(path)
    assert path.read_bytes() == whole
    writer.write("step", step=50)
    writer.close()
    assert [event["step"] for event in EventReader(path).read()] == list(range(51))


def test_a_file_that_is_only_a_torn_line_is_emptied(path):
    path.write_bytes(b'{"kind"')
    EventWriter(path).close()
    assert path.read_bytes() == b""


def test_a_whole_file_is_left_as_it_is(path):
    path.write_bytes(lines(step(1)))
    EventWriter(path).close()
    assert path.read_bytes() == lines(step(1))


def test_a_full_disk_is_an_error_and_leaves_no_half_line(path):
    resource = pytest.importorskip("resource", reason="Windows has no limit on file sizes")
    writer = EventWriter(path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))  # the system then writes as much as fits
        with pytest.raises(OSError):
            for number in range(50):
                writer.write("step", step=number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    kept = EventReader(path).read()
    assert path.read_bytes().endswith(b"}\n") and len(kept) > 10
    writer.write("note", step=-1)
    writer.close()
    assert EventReader(path).read() == [*kept, last_event(path)]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=8), st.data())
def test_a_reader_that_sees_the_file_grow_by_any_pieces_gets_every_event_once(tmp_path_factory, texts, data):
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    path.touch()
    events = [step(number, text=text) for number, text in enumerate(texts)]
    content, reader, got = lines(*events), EventReader(path), []
    while content:
        piece = data.draw(st.integers(1, len(content)))
        with open(path, "ab") as file:
            file.write(content[:piece])
        content = content[piece:]
        got += reader.read()
    assert got == events
    assert reader.offset == path.stat().st_size


def test_a_reader_goes_on_from_the_offset_of_another(path):
    path.write_bytes(lines(step(1), step(2)))
    first = EventReader(path)
    first.read()
    path.write_bytes(lines(step(1), step(2), step(3)))
    assert EventReader(path, first.offset).read() == [step(3)]


def test_a_shortened_file_is_read_again(path):
    path.write_bytes(lines(step(1), step(2), step(3)))
    reader = EventReader(path)
    reader.read()
    path.write_bytes(lines(step(9)))
    assert reader.read() == [step(9)]


def test_a_replaced_file_is_read_again_even_if_it_is_longer(path):
    path.write_bytes(lines(step(1)))
    reader = EventReader(path)
    reader.read()
    other = path.with_name("other")
    other.write_bytes(lines(step(5), step(6), step(7)))
    other.replace(path)
    assert reader.read() == [step(5), step(6), step(7)]


def test_a_file_that_is_not_there_yet_has_no_events(path):
    reader = EventReader(path)
    assert reader.read() == [] and last_event(path) is None
    path.write_bytes(lines(step(1)))
    assert reader.read() == [step(1)]


def test_what_is_no_event_is_passed_over(path):
    path.write_bytes(lines(step(1)) + b"\n{oops\n[1]\n12\n\xff\xfe\n{}\n" + lines(step(2)) + b'{"kind": "no')
    assert EventReader(path).read() == [step(1), step(2)]
    assert last_event(path) == step(2)


def test_the_last_event_is_found_at_the_end_of_a_big_file(path):
    block = lines(step(1, text="x" * 100)) * 1000
    with open(path, "wb") as file:
        for _ in range(200):  # 25 MB
            file.write(block)
        file.write(lines(step(2)))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert last_event(path) == step(2)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.05  # reading it all takes half a second


@pytest.mark.parametrize("size", [65_000, 65_536, 70_000, 400_000])
def test_a_last_event_of_any_length_is_found(path, size):
    path.write_bytes(lines(step(1), step(2, text="ä" * (size // 2))))
    assert last_event(path)["step"] == 2
    path.write_bytes(lines(step(1), step(2)) + b"x" * size)  # torn
    assert last_event(path) == step(2)


def test_a_start_voids_what_came_after_its_step():
    start = {"kind": "start", "step": 2}
    note = {"kind": "phase", "name": "loading"}
    events = [{"kind": "start", "step": 0}, note, step(1), step(2), step(3), step(4), start, step(3, loss=1.0)]
    assert rewind(events) == [{"kind": "start", "step": 0}, note, step(1), step(2), start, step(3, loss=1.0)]
    again = {"kind": "start", "step": 0}
    assert rewind([*events, again]) == [{"kind": "start", "step": 0}, note, again]
    assert rewind([]) == []


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
def test_every_line_is_whole_after_fifteen_kills_at_random_moments(path):
    for kill in range(15):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"started\n"
        time.sleep(0.003 * (kill % 5))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if kill % 3 == 0:  # a kill inside the write itself, which no test can hit at will
            with open(path, "ab") as file:
                file.write(b'{"t":1,"kind":"st')
    EventWriter(path).close()
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    starts = [event["step"] for event in events if event["kind"] == "start"]
    assert len(starts) == 15 and starts == sorted(starts) and starts[-1] > starts[0]
    steps = [event["step"] for event in rewind(events) if event["kind"] == "step"]
    assert steps == list(range(1, events[-1]["step"] + 1))


def test_a_reader_of_some_kinds_passes_over_the_others(path):
    writer = EventWriter(path)
    writer.write("step", step=1, text="rank")
    writer.write("rank", step=1)
    path.write_bytes(path.read_bytes() + b'{"kind":["rank"]}\n{"kind":"rank"')
    reader = EventReader(path, kinds=("rank", "start"))
    assert [event["kind"] for event in reader.read()] == ["rank"]
    assert reader.offset == path.read_bytes().rfind(b"\n") + 1 and reader.read() == []


def test_the_newest_events_reach_back_to_the_kinds_that_are_asked_for(path):
    writer = EventWriter(path)
    writer.write("step", step=1)
    for _ in range(3):
        writer.write("image_loss", images={"x" * 100 + str(n): [1, 1.0] for n in range(1000)})
    assert len(newest_events(path)) < 2
    assert newest_events(path, "step", "start")[0]["step"] == 1
    assert len(newest_events(path, "never")) == 4
    assert newest_events(path.with_name("none"), "step") == []


def test_every_kind_that_a_run_writes_is_explained():
    source = Path(newest_events.__code__.co_filename)
    listed = set(re.findall(r"^# ([a-z_]+)(?:, ([a-z_]+))?  ", source.read_text(), re.MULTILINE))
    explained = {kind for kinds in listed for kind in kinds}
    written = {kind for path in source.parent.glob("*.py")
               for kind in re.findall(r'recorder\.event\(\s*"([a-z_]+)"', path.read_text())}
    assert len(written) > 10 and written <= explained, written - explained


def test_events_from_the_end_are_those_from_the_start_turned_round(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    assert list(newest_first(path)) == []
    writer = EventWriter(path)
    for step in range(200):
        writer.write("step", step=step, text="x" * (step % 37 * 11))
    for block in (64, 500, 1 << 16):
        monkeypatch.setattr("trainer.events.BLOCK", block)
        assert list(newest_first(path)) == EventReader(path).read()[::-1]
        with open(path, "ab") as file:
            file.write(b'{"kind": "step", "step": 999, "torn": "' + b"y" * 300)
        assert list(newest_first(path)) == EventReader(path).read()[::-1]
        heal(path)
    path.write_bytes(b'{"kind": "torn' * 100)
    assert list(newest_first(path)) == [] and last_event(path) is None
