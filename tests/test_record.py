"""What a run puts down: events, TensorBoard files, and lines that a person can read."""

import io
import math
import os
import struct
import time

import pytest

from trainer import record
from trainer import run as runs
from trainer.events import Event, EventReader
from trainer.record import Recorder, clock, with_rate
from trainer.run import Run


@pytest.fixture
def run(tmp_path):
    return runs.create(tmp_path, "cat", "")


class Terminal:
    """A real pseudo-terminal of a given width: `stream` to write to, `shown()` what came."""

    def __init__(self, columns: int) -> None:
        pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
        termios = pytest.importorskip("termios")
        import fcntl

        self._outside, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(inside, "w", encoding="utf-8")

    def shown(self) -> str:
        """All that was written; the system hands it through in pieces, and not at once."""
        self.stream.write("\0")
        self.stream.flush()
        shown = b""
        while not shown.endswith(b"\0"):
            shown += os.read(self._outside, 65536)
        return shown[:-1].decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self._outside)


@pytest.fixture
def terminal():
    terminal = Terminal(60)
    yield terminal
    terminal.close()


def events(run: Run) -> list[Event]:
    return [{key: value for key, value in event.items() if key != "t"} for event in EventReader(run.events).read()]


def take(recorder: Recorder, step: int, **changes: object) -> None:
    facts = {"loss": 0.5, "lr": 1e-4, "grad_norm": 2.0, "sec": 0.5, "vram": None, "vram_peak": None,
             "ram": 2**30}
    recorder.step(step, 100, **(facts | changes))


def test_a_step_is_an_event_with_all_its_numbers(run):
    recorder = Recorder(run, tensorboard=False, terminal=io.StringIO())
    take(recorder, 7, sec=0.123456, vram=5, vram_peak=6)
    recorder.close()
    assert events(run) == [{"kind": "step", "step": 7, "steps": 100, "loss": 0.5, "lr": 1e-4, "grad_norm": 2.0,
                            "sec": 0.1235, "vram": 5, "vram_peak": 6, "ram": 2**30, "eta": 11.5}]


def test_the_time_left_follows_the_usual_step_not_the_odd_slow_one(run):
    recorder = Recorder(run, tensorboard=False, terminal=io.StringIO())
    assert recorder.seconds_per_step() is None
    for step, sec in enumerate([9.0, 0.5, 0.5, 0.5, 30.0], 1):
        take(recorder, step, sec=sec)
    assert recorder.seconds_per_step() == 0.5
    assert events(run)[-1]["eta"] == 0.5 * 95
    for step in range(100):
        take(recorder, step, sec=2.0 if step < 60 else 1.0)
    assert recorder.seconds_per_step() == 1.0  # it forgets how it was long ago
    recorder.close()


def test_a_step_without_a_finite_loss_is_written_all_the_same(run):
    recorder = Recorder(run, tensorboard=True, terminal=io.StringIO())
    take(recorder, 1, loss=math.nan, grad_norm=math.inf)
    recorder.close()
    assert (events(run)[0]["loss"], events(run)[0]["grad_norm"]) == (None, None)


def test_in_a_log_a_line_comes_now_and_then_and_at_the_end(run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    recorder = Recorder(run, tensorboard=False, terminal=log)
    for step in range(1, 101):
        now[0] += 0.5
        take(recorder, step, vram_peak=3 * 2**30)
    recorder.close()
    lines = log.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 0.5000  0.50 s/it  ETA 50 s  3.0 GiB"
    assert [line.split()[1] for line in lines] == ["1/100", "22/100", "43/100", "64/100", "85/100", "100/100"]
    assert len(events(run)) == 100


def test_on_a_terminal_one_line_is_redrawn_and_never_wraps(run, terminal):
    recorder = Recorder(run, tensorboard=False, terminal=terminal.stream)
    take(recorder, 1, vram_peak=3 * 2**30)
    take(recorder, 2, vram_peak=3 * 2**30)
    recorder.note(2, "look")
    recorder.close()
    first, second, note = terminal.shown().split("\r\x1b[K")[1:]
    assert first == "step 1/100  loss 0.5000  0.50 s/it  ETA 50 s  3.0 GiB"
    assert second.startswith("step 2/100") and "\n" not in first + second
    assert note == "note: look\r\n"


def test_on_a_narrow_terminal_the_line_is_cut(run):
    terminal = Terminal(30)
    recorder = Recorder(run, tensorboard=False, terminal=terminal.stream)
    take(recorder, 1)
    assert terminal.shown() == "\r\x1b[K" + "step 1/100  loss 0.5000  0.50 s/it  ETA 50 s"[:29]
    recorder.close()
    terminal.close()


def test_a_long_preparation_is_told_once_a_second_and_at_its_ends(run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    recorder = Recorder(run, tensorboard=False, terminal=log)
    for done in range(41):
        recorder.phase("caching latents", done, 40)
        now[0] += 0.125
    recorder.phase("caching captions", 0, 3)
    recorder.phase("loading")
    recorder.close()
    assert [(event["name"], event["done"], event["of"]) for event in events(run)] == [
        *(("caching latents", done, 40) for done in range(0, 41, 8)), ("caching captions", 0, 3), ("loading", 0, 0)]
    assert log.getvalue() == "caching latents\ncaching captions\nloading\n"


def test_waiting_is_told_once_a_minute(run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    recorder = Recorder(run, tensorboard=False, terminal=io.StringIO())
    for _ in range(240):
        recorder.phase("waiting for the GPU")
        now[0] += 0.5
    recorder.close()
    assert len(events(run)) == 2  # and never so seldom that the run seems dead


def test_what_a_resume_goes_over_again_is_void_for_tensorboard_and_the_last_saved_step_is_not(run):
    run.checkpoint(7).mkdir(parents=True)
    Recorder(run, tensorboard=True, terminal=io.StringIO()).close()
    (file,) = run.tensorboard.iterdir()
    assert file.read_bytes()[-4 - 6:-4] == bytes([2 << 3, 8, 7 << 3 | 2, 2, 1 << 3, 1])  # step 8, session_log START


def test_a_phase_on_a_terminal_counts_up(run, terminal):
    recorder = Recorder(run, tensorboard=False, terminal=terminal.stream)
    recorder.phase("caching latents", 0, 2)
    recorder.phase("caching latents", 2, 2)
    recorder.phase("loading")
    recorder.close()
    assert terminal.shown().split("\r\x1b[K")[1:] == ["caching latents 0/2", "caching latents 2/2", "loading"]


def test_a_note_is_an_event_and_a_line(run):
    log = io.StringIO()
    recorder = Recorder(run, tensorboard=False, terminal=log)
    recorder.note(4, "the disk is nearly full")
    recorder.close()
    assert events(run) == [{"kind": "note", "step": 4, "text": "the disk is nearly full"}]
    assert log.getvalue() == "note: the disk is nearly full\n"


def test_events_wait_for_room_on_a_full_disk_and_lines_and_curves_do_not(run):
    resource = pytest.importorskip("resource", reason="Windows has no limit on file sizes")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(run.path / "log", "w", encoding="utf-8") as log:
        recorder = Recorder(run, tensorboard=True, terminal=log)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, old[1]))  # the system then writes as much as fits
            for number in range(40):
                recorder.note(number, "no room")
                recorder.scalars(number, {"loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert len(events(run)) < 15
        time.sleep(0.01)
        late = time.time()
        recorder.note(40, "room again")
    told = EventReader(run.events).read()
    assert [event["step"] for event in told] == list(range(41))
    assert [event["t"] for event in told] == sorted(event["t"] for event in told) and told[-2]["t"] < late
    (board,) = run.tensorboard.iterdir()
    whole, sizes = board.read_bytes(), []
    while sum(sizes) < len(whole):
        sizes.append(struct.unpack_from("<Q", whole, sum(sizes))[0] + 16)  # length, its checksum, data, its checksum
    assert sum(sizes) == len(whole) and len(sizes) > 5
    recorder.close()


def test_without_a_terminal_lines_go_to_the_log(run, capsys):
    recorder = Recorder(run, tensorboard=False, terminal=None)
    recorder.say("hello")
    recorder.close()
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize("encoding, shown", [("utf-8", "caf? 日"), ("cp1252", "caf? ?"), ("ascii", "caf? ?")])
def test_what_a_terminal_cannot_show_does_not_end_a_run(run, encoding, shown):
    raw = io.BytesIO()
    recorder = Recorder(run, tensorboard=False, terminal=io.TextIOWrapper(raw, encoding=encoding))
    recorder.note(0, os.fsdecode(b"caf\xe9") + " 日")
    recorder.close()
    assert raw.getvalue().decode(encoding) == f"note: {shown}\n"


def test_numbers_and_pictures_go_to_tensorboard_only_when_wanted(run, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"picture bytes")
    for wanted in (False, True):
        recorder = Recorder(run, tensorboard=wanted, terminal=io.StringIO())
        take(recorder, 1)
        recorder.scalars(1, {"rank/attn1": 3.0})
        recorder.image("samples/0", picture, 8, 8, 1)
        recorder.close()
        if not wanted:
            assert not run.tensorboard.exists()
    content = b"".join(file.read_bytes() for file in run.tensorboard.iterdir())
    for tag in (b"train/loss", b"train/lr", b"train/grad_norm", b"rank/attn1", b"samples/0", b"picture bytes"):
        assert tag in content
    assert len(events(run)) == 2


def test_a_resumed_run_goes_on_in_the_same_event_file(run):
    for step in (1, 2):
        recorder = Recorder(run, tensorboard=False, terminal=io.StringIO())
        take(recorder, step)
        recorder.close()
    assert [event["step"] for event in events(run)] == [1, 2]


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (89.4, "89 s"), (90, "2 min"), (600, "10 min"), (5399, "90 min"), (5400, "1.5 h"), (90_000, "25.0 h")])
def test_durations_are_said_as_people_say_them(seconds, text):
    assert clock(seconds) == text


class Said:
    """Keeps what a recorder is told."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def phase(self, name: str, done: int = 0, of: int = 0, detail: str = "") -> None:
        self.details.append(detail)


def test_the_rate_counts_only_what_this_run_encoded() -> None:
    said = Said()
    tell = with_rate(said, "caching latents", "images")  # type: ignore[arg-type]
    tell(100, 200)  # were there already
    time.sleep(0.2)
    tell(110, 200)
    assert said.details[0] == ""
    words, rate = said.details[1].split(", ")
    assert words == "110 of 200" and 5 < float(rate.removesuffix(" images/s")) <= 50
