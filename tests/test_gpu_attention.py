"""Every kernel of attention gives the gradients of the plain one in each model's own layouts, on a real GPU.

    pytest -m gpu tests/test_gpu_attention.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench import step_time, true_size
from trainer.fast import attention
from trainer.fast import compile as block_compiler
from trainer.fast.low_bits import likeness
from trainer.schema import FLOW_FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)
CASES = ["klein-4b:1", "klein-4b:2:selective", "flux1-dev:1:full", "flux1-dev:2:selective", "sdxl:1"]


@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_attention(case: str, fused: str) -> None:
    """cuDNN's kernels among them, where this GPU has them: what they keep of one block must not be used for another,
    nor what they keep of a plain pass for a compiled one."""
    [row] = step_time.rows_of(case, ["stella"])
    size = true_size.shrunk(true_size.SIZES[row.size])
    torch.manual_seed(0)
    denoiser = true_size.denoiser_of(size, "none", GPU, torch.bfloat16)
    changes = [f"adapter.fuse_qkv={fused}"] if size.family in FLOW_FAMILIES else []
    session = step_time.session_of(size, "stella", ["adapter.init=random", *changes], denoiser, GPU, torch.bfloat16,
                                   row)
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradients(session, size)
    for compiled in (False, True):
        if compiled:
            block_compiler.install(session.denoiser)
        for name in attention.candidates(GPU):
            torch._dynamo.reset()  # what was compiled keeps the kernels of its first call
            with attention.preferred(name):
                assert likeness([gradients(session, size)], [plain]) > 0.99, (name, compiled)


def gradients(session, size: true_size.Size) -> list[Tensor]:
    session.gradients(true_size.draws(size, 0))
    found = [leaf.grad.clone() for leaf in session.adapter.parameters()]
    session.adapter.zero_grad()
    session.use("off")
    return found
