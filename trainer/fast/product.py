"""x W^T from codes of 8 bits, with scales, a bias and a product of low rank added in the same pass.

Operators, so that the compiler takes them as they are; on a GPU they are Triton's kernels, elsewhere torch's own
operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.quantize.linear import rows_to_codes


@torch.library.custom_op("stiefel_studio::codes_of_rows", mutates_args=())
def codes_of_rows(x: Tensor, gain: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x * gain [m, k] in int8 or a float8, and each row's scale [m, 1]; gain: [k, 1] or [1, 1]."""
    codes, own = rows_to_codes(x if gain is None else x.float() * gain.t(), kind)
    return codes.contiguous(), own  # in the order that the compiler is told, whatever that of x is


@codes_of_rows.register_kernel("cuda")
def _(x: Tensor, gain: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    from trainer.fast import product_kernel  # late: Triton is only where there is a GPU for it

    return product_kernel.rows_to_codes(x, gain, kind)


@codes_of_rows.register_fake
def _(x: Tensor, gain: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=kind, memory_format=torch.contiguous_format), x.new_empty(
        len(x), 1, dtype=torch.float32)


@torch.library.custom_op("stiefel_studio::product_of_codes", mutates_args=())
def product_of_codes(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None,
                     hidden: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x * own) (codes * scale)^T + bias + hidden factor^T, summed in fp32 and rounded once: [m, n] in `dtype`.

    x: [m, k] and codes: [n, k], both int8 or both a float8; own: [m, 1]; scale: [n, 1] or [1, 1]; bias: [n];
    hidden: [m, r] and factor: [n, r], both in the model's dtype.
    """
    y = x.float() @ codes.float().t() * own
    y = y if scale is None else y * scale.t()
    y = y if bias is None else y + bias.float()
    return (y if hidden is None or factor is None else y + hidden.float() @ factor.float().t()).to(dtype)


@product_of_codes.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None, hidden: Tensor | None,
      factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    from trainer.fast import product_kernel  # late, as above

    return product_kernel.product(x, codes, own, scale, bias, hidden, factor, dtype)


@product_of_codes.register_fake
def _(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None, hidden: Tensor | None,
      factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(len(x), len(codes), dtype=dtype)
