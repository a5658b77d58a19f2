"""What is alive at the peak of a computation is counted to the byte."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.memory.trace import META, Alive, gpu_kernels

KIB = 1024


def kib(count: int = 1) -> torch.Tensor:
    return torch.empty(count * 256, device=META)


def test_the_peak_is_of_what_lives_at_one_time() -> None:
    with Alive() as alive:
        first = kib(4)
        second = kib(2)
        del first
        third = kib(3)
    assert (alive.now, alive.peak) == (5 * KIB, 6 * KIB)
    del second, third
    assert alive.now == 0


def test_views_and_changes_in_place_hold_nothing_and_small_tensors_take_a_grain() -> None:
    weight = kib(8)
    with Alive([weight]) as alive:
        views = weight.view(2, -1), weight.t(), weight.mul_(2)
        assert alive.now == 0
        small = torch.empty(1, device=META)
    assert alive.peak == 512 and views and small.numel()


def test_a_backward_pass_holds_what_it_saved() -> None:
    x = kib().requires_grad_()
    with Alive([x]) as alive:
        y = x.exp()  # saves its result
        z = y.sum()
        del y
        assert alive.now == KIB + 512
        z.backward()
        del z
    assert alive.now == KIB  # the gradient


def test_attention_holds_no_matrix_of_scores() -> None:
    q, k, v = (torch.empty(1, 4, 128, 32, device=META, requires_grad=True) for _ in range(3))
    size, rows = q.numel() * 4, 4 * 128 * 4
    with Alive([q, k, v]) as alive, gpu_kernels():
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert 4 * size <= alive.peak <= 6 * size + 4 * rows < 4 * 128 * 128 * 4 * 3
    assert F.scaled_dot_product_attention is not None and F.rms_norm(torch.ones(2, 4), (4,)).sum() > 7  # as they were


def test_a_fused_norm_holds_its_input_alone() -> None:
    x = kib(64).requires_grad_()
    with Alive([x]) as alive, gpu_kernels():
        y = F.rms_norm(x.view(-1, 256), (256,))
        assert alive.now == 64 * KIB + 512  # its result, and one number for each of 64 rows
        y.sum().backward()
