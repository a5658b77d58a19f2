"""x W^T from codes of 8 bits, with scales, a bias and a product of low rank added in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("stiefel_studio::product_of_codes", mutates_args=())
def product_of_codes(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None,
                     hidden: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x * own) (codes * scale)^T + bias + hidden factor^T, summed in fp32 and rounded once: [m, n] in `dtype`.

    x: [m, k] and codes: [n, k], both int8 or both a float8; own: [m, 1]; scale: [n, 1] or [1, 1]; bias: [n];
    hidden: [m, r] and factor: [n, r], both in the model's dtype. An operator, so that the compiler takes it as it is.
    """
    y = x.float() @ codes.float().t() * own
    y = y if scale is None else y * scale.t()
    y = y if bias is None else y + bias.float()
    return (y if hidden is None or factor is None else y + hidden.float() @ factor.float().t()).to(dtype)


@product_of_codes.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None, hidden: Tensor | None,
      factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    from trainer.fast import product_kernel  # late: Triton is only where there is a GPU for it

    return product_kernel.product(x, codes, own, scale, bias, hidden, factor, dtype)


@product_of_codes.register_fake
def _(x: Tensor, codes: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None, hidden: Tensor | None,
      factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(len(x), len(codes), dtype=dtype)
