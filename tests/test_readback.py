"""Numbers of a step on their way from the device to the event file."""

import io
import math
import time

import pytest
import torch

from trainer import readback as readbacks
from trainer import run as runs
from trainer.events import Event, EventReader
from trainer.readback import LAG, Readback
from trainer.record import Recorder
from trainer.sample_losses import SampleLosses


@pytest.fixture
def run(tmp_path):
    return runs.create(tmp_path, "cat", "")


@pytest.fixture
def recorder(run):
    recorder = Recorder(run, tensorboard=False, terminal=io.StringIO())
    yield recorder
    recorder.close()


def push(readback: Readback, step: int, loss: float = 0.5, skipped: int = 0) -> None:
    device = readback.device
    readback.push(step, torch.tensor(loss, device=device), torch.tensor(2.0, device=device),
                  torch.tensor(skipped, dtype=torch.bool, device=device), lr=1e-3 * step)


def steps(recorder: Recorder) -> list[Event]:
    return [event for event in EventReader(recorder.run.events).read() if event["kind"] == "step"]


CPU = torch.device("cpu")


def test_on_a_cpu_every_step_is_put_down_at_once(recorder):
    readback = Readback(recorder, 10, CPU, every=1)
    for step in (1, 2, 3):
        push(readback, step, loss=step / 4)
        assert steps(recorder)[-1]["step"] == step
    last = steps(recorder)[-1]
    assert (last["loss"], last["grad_norm"], last["lr"], last["steps"]) == (0.75, 2.0, 0.003, 10)
    assert (last["vram"], last["vram_peak"]) == (None, None)


def test_steps_between_are_left_out_but_never_the_last(recorder):
    readback = Readback(recorder, 10, CPU, every=4)
    for step in range(1, 11):
        push(readback, step)
    readback.drain()
    assert [event["step"] for event in steps(recorder)] == [4, 8, 10]


def test_a_run_of_few_events_gives_a_sign_of_life_now_and_then(recorder, monkeypatch):
    monkeypatch.setattr(readbacks, "SIGN_OF_LIFE", 0.05)
    readback = Readback(recorder, 100, CPU, every=90)
    push(readback, 1)
    time.sleep(0.06)
    push(readback, 2)
    push(readback, 3)
    assert [event["step"] for event in steps(recorder)] == [2]


def test_a_lasting_slow_down_is_a_note_and_a_new_pace_is_none(recorder, monkeypatch):
    seconds = iter([1.0] * 3 + [0.1] * 20 + [0.3] * 20 + [0.1] * 23 + [0.3] * 19)
    now = [0.0]
    monkeypatch.setattr(readbacks.time, "perf_counter", lambda: now[0])
    readback = Readback(recorder, 10**6, CPU, every=10**6)
    for step, sec in enumerate(seconds, 1):
        if step == 44:
            readback.restart_clock(new_pace=True)
        now[0] += sec
        push(readback, step)
    notes = [event for event in EventReader(recorder.run.events).read() if event["kind"] == "note"]
    assert [(note["step"], note["text"].partition(" (")[0]) for note in notes] == [
        (43, "Steps take 0.30 s now, 3.0 times as long as at first")]


def test_a_steps_loss_is_known_even_when_it_gets_no_event(recorder):
    readback = Readback(recorder, 10, CPU, every=4)
    push(readback, 1, loss=0.25)
    assert steps(recorder) == []


def test_bad_steps_are_counted_in_a_row_and_each_is_told(recorder):
    readback = Readback(recorder, 10, CPU, every=5)
    counts = []
    for step, skipped in enumerate([1, 1, 0, 1, 1, 1], 1):
        push(readback, step, loss=math.nan if skipped else 0.5, skipped=skipped)
        counts.append(readback.bad_in_row)
    assert counts == [1, 2, 0, 1, 2, 3]
    notes = [event for event in EventReader(recorder.run.events).read() if event["kind"] == "note"]
    assert [note["step"] for note in notes] == [1, 2, 4, 5, 6]
    assert notes[0]["text"] == "step 1 was skipped: the loss or its gradient was not finite"
    assert [event["loss"] for event in steps(recorder)] == [None]


def test_a_loss_of_half_precision_is_put_down_as_it_is(recorder):
    readback = Readback(recorder, 10, CPU, every=1)
    readback.push(1, torch.tensor(0.333, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.float64),
                  torch.tensor(0.0), lr=1.0)
    assert (steps(recorder)[0]["loss"], steps(recorder)[0]["grad_norm"]) == (0.33203125, 3.0)


def test_time_between_steps_counts_only_unless_the_clock_is_restarted(recorder):
    readback = Readback(recorder, 10, CPU, every=1)
    time.sleep(0.05)
    push(readback, 1)
    push(readback, 2)
    time.sleep(0.05)
    readback.restart_clock()
    push(readback, 3)
    first, second, third = steps(recorder)
    assert first["sec"] >= 0.05 > max(second["sec"], third["sec"])


def samples_told(recorder: Recorder, kind: str) -> list[tuple[int, list[int] | dict[str, list[float]]]]:
    return [(event["step"], event["count" if kind == "timesteps" else "images"])
            for event in EventReader(recorder.run.events).read() if event["kind"] == kind]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU")])])
def test_samples_are_told_every_so_many_steps_and_at_the_end(recorder, device):
    readback = Readback(recorder, 10, torch.device(device), every=5, samples=SampleLosses(["a", "b"], 10, every=2))
    seen = torch.zeros(2, 2, 1, device=device)  # two micro-batches of one sample
    for step in (1, 2, 3):
        seen[:, 0, 0], seen[:, 1, 0] = torch.tensor([1.0, 3.0]), torch.tensor([0.0, step])  # in place, as a step does
        zero = torch.tensor(0.0, device=device)
        readback.push(step, zero, zero, zero, 1.0, [0, 1], seen)
    readback.finish()
    assert samples_told(recorder, "timesteps") == [(2, [2, 1, 1, *[0] * 7]), (3, [1, 0, 0, 1, *[0] * 6])]
    assert samples_told(recorder, "image_loss") == [(2, {"a": [2, 1.0], "b": [2, 1.0]}),
                                                    (3, {"a": [1, 1.0], "b": [1, 1.0]})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_events_lag_by_two_steps_and_none_is_lost(recorder):
    readback = Readback(recorder, 10, torch.device("cuda"), every=1)
    for step in range(1, 6):
        push(readback, step, loss=step / 4)
        assert [event["step"] for event in steps(recorder)] == list(range(1, max(1, step - LAG + 1)))
    readback.drain()
    assert [(event["step"], event["loss"]) for event in steps(recorder)] == [(step, step / 4) for step in range(1, 6)]
    assert steps(recorder)[0]["vram_peak"] >= steps(recorder)[0]["vram"] > 0
