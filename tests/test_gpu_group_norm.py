"""Group norms with channels last give what torch's own gives, in no more memory, on a real GPU.

    pytest -m gpu tests/test_gpu_group_norm.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.bench import step_time, true_size
from tests.test_gpu_attention import gradients
from trainer.fast import convolutions, group_norm
from trainer.fast.group_norm import ChannelsLastNorm
from trainer.fast.low_bits import likeness

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)
NEAR = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", [(4, 320, 64, 64), (1, 2560, 32, 32), (1, 960, 128, 128), (3, 64, 5, 7),
                                   (2, 1280, 8, 8)])
def test_norms_and_their_gradients_are_those_of_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert group_norm.works(GPU, dtype)
    generator = torch.Generator(GPU).manual_seed(0)
    x, grad = (torch.randn(shape, device=GPU, generator=generator).to(dtype, memory_format=torch.channels_last)
               for _ in range(2))
    x = x * 2 + 30 if dtype == torch.float32 else x  # far from zero: squares may not be taken from squares
    layer = nn.GroupNorm(32, shape[1], eps=1e-6, device=GPU, dtype=dtype).requires_grad_(False)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    exact, plain = [x.double().requires_grad_()], F.group_norm
    y = plain(exact[0], 32, layer.weight.double(), layer.bias.double(), layer.eps)
    y.backward(grad.double())
    group_norm.install(model := nn.ModuleList([layer]))
    found = x.clone().requires_grad_()
    out = model[0](found)
    out.backward(grad)
    for one, other in ((out, y), (found.grad, exact[0].grad)):
        assert one.dtype == dtype and one.is_contiguous(memory_format=torch.channels_last)
        assert (one - other).norm() <= NEAR[dtype] * other.norm()
    again = x.clone().requires_grad_()
    model[0](again).backward(grad)
    assert torch.equal(again.grad, found.grad)


def test_the_kernels_may_be_tried_out_in_the_middle_of_a_checkpointed_pass() -> None:
    layer = nn.GroupNorm(32, 64, device=GPU).requires_grad_(False)
    group_norm.install(nn.ModuleList([layer]))
    found = []
    for ask in (group_norm.works.cache_clear, lambda: None):
        ask()
        x = torch.ones(2, 64, 8, 8, device=GPU).cumsum(3).to(memory_format=torch.channels_last).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).pow(3).sum().backward()  # a square's gradient would be zero
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("case", ["sd15:2", "sdxl:1:selective"])
def test_a_steps_gradients_are_alike_and_no_more_is_held(exact, case: str) -> None:
    [row] = step_time.rows_of(case, ["stella"])
    size = true_size.shrunk(true_size.SIZES[row.size])
    found, held = [], []
    for plain in (True, False):
        torch.manual_seed(0)
        denoiser = true_size.denoiser_of(size, "none", GPU, torch.float32)
        session = step_time.session_of(size, "stella", ["adapter.init=random"], denoiser, GPU, torch.float32, row)
        norms = [module for module in session.denoiser.modules() if isinstance(module, ChannelsLastNorm)]
        assert len(norms) > 20
        if plain:
            convolutions.lay_out(session.denoiser, torch.contiguous_format)
        found.append(gradients(session, size))
        before = torch.cuda.memory_allocated()
        loss = session.forward(session.inputs(true_size.draws(size, 0)))
        held.append(torch.cuda.memory_allocated() - before)
        del loss, session, denoiser, norms
    assert likeness([found[1]], [found[0]]) > 0.9999
    assert held[1] <= 1.02 * held[0], held
