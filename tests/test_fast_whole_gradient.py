"""Gradients that come to Flux.1's attention lie alike in both kinds of its blocks, as cuDNN's kept plans need it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench import step_time, true_size


@pytest.mark.parametrize("case", ["flux1-dev:1", "flux1-dev:1:full", "flux1-dev:1:selective"])
def test_attentions_gradients_are_contiguous_and_the_weights_the_same(case: str, monkeypatch) -> None:
    [row] = step_time.rows_of(case, ["lora"])
    size, device = true_size.shrunk(true_size.SIZES[row.size]), torch.device("cpu")
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, "none", device, torch.float32)
    session = step_time.session_of(size, "lora", [], denoiser, device, torch.float32, row)
    real, whole = F.scaled_dot_product_attention, []

    def watching(*given: Tensor, **named: object) -> Tensor:
        found = real(*given, **named)  # b h n d
        if found.requires_grad:
            found.register_hook(lambda grad: whole.append(grad.transpose(1, 2).is_contiguous()))
        return found

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    session.gradients(true_size.draws(size, 0))
    assert len(whole) == 5 and all(whole)
