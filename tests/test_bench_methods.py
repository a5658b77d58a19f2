"""The bench of optimizer steps: what is profiled is what a training does."""

from __future__ import annotations

import torch

from tests.bench import methods
from trainer.adapters.bank import MEASURE_EVERY, Adapter


def test_profiled_steps_correct_rounding_once_in_eight_as_training_does(monkeypatch) -> None:
    measured, after = [], Adapter.after_step
    monkeypatch.setattr(Adapter, "after_step", lambda self: (measured.append(self.measures), after(self)))
    update = methods.make([(24, 16)] * 2, 4, "StelLA", torch.device("cpu"))
    lines = list(methods.profiled(update, torch.device("cpu")))
    assert measured[-MEASURE_EVERY:].count(True) == 1 and update.adapter.updates == len(measured)
    assert {line.split()[0] for line in lines[:8]} == {"begin", "clip", "guard", "before", "optimizer", "after",
                                                       "average", "zero"}
