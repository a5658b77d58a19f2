"""Frozen linears that multiply in 8 bits, floats or integers: x W^T forward, and grad W for the gradient of x."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adapters.fused import add_low_rank
from trainer.adapters.layer import AdaptedLayer, adapted_class
from trainer.errors import first_line
from trainer.fast.product import codes_of_rows, product_of_codes
from trainer.quantize.linear import FP8, RowScaledLinear, rows_to_codes, top_of
from trainer.quantize.model import linears_in_blocks

# Of weights, inputs and gradients alike: e5m2 has more range, which scales make needless, and half the precision.
CODES = {"fp8": FP8, "int8": torch.int8}
STEP = 16  # both sides of a weight are multiples of it: what the kernel loads at a time
# Of the largest number of a product, where a kernel is tried: a bias, a scale, a sign or an adapter's part that is left
# out changes ten times as much. Right ones stay below a third: bf16 rounds by at most 1/256, and where FP8's products
# are added with some 14 bits (Hopper) 64 of them lose at most 1/8192 of the largest each, which is a quarter of that
# number.
WRONG = 0.02
FEWEST_ROWS = 32  # of an input; with fewer the product is made in the model's dtype


Product = Callable[[Tensor], Tensor]


class LowBits(NamedTuple):
    """How a model's frozen linears multiply, and which of them do."""

    kind: str  # of CODES
    paths: frozenset[str]  # within the denoiser


class LowBitLinear(RowScaledLinear):
    """x W^T + bias by a product of codes: those of W [m, n], and those of x, made as it comes.

    Each row of x has its own scale, so that samples do not change each other's numbers. The gradient of x is grad W by
    the same codes of W, whose scales go into grad before its own are made. The kernel wants W in the order of its
    columns there: a linear that had 16 bits keeps its codes in both orders, which takes as much; one that was stored in
    8 bits turns them over in each backward pass. An adapter's product is added in the kernel.
    """

    adds_pair = True  # an adapted layer leaves its pair's product to this one
    code_kind: torch.dtype
    turned: Tensor | None  # n m, of those that had 16 bits

    def product(self, x: Tensor, hidden: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        """x W^T + bias + hidden up^T: [..., n], [..., r] and [m, r] -> [..., m]."""
        if x.numel() < FEWEST_ROWS * x.shape[-1]:
            return self._with_pair(super().product(x), hidden, up)
        codes, scale = self.held()
        return multiplied(x, codes, scale=scale, bias=self.bias, hidden=hidden, factor=up)

    def input_gradient(self, grad: Tensor, hidden: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        """grad W + hidden down^T: [..., m], [..., r] and [n, r] -> [..., n]."""
        if grad.numel() < FEWEST_ROWS * grad.shape[-1]:
            return self._with_pair(super().input_gradient(grad), hidden, down)
        codes, scale = self.held()
        turned = codes.t().contiguous() if self.turned is None else self.turned
        return multiplied(grad, turned, gain=scale, hidden=hidden, factor=down)

    def held(self) -> tuple[Tensor, Tensor]:
        """Codes of W [m, n], and their scales [m, 1] or [1, 1]."""
        return self.codes, self.scale

    def _with_pair(self, y: Tensor, hidden: Tensor | None, factor: Tensor | None) -> Tensor:
        if hidden is not None:
            add_low_rank(y, hidden, factor, self)
        return y


class TrialLinear(LowBitLinear):
    """The same products while the weight is still there as it was: its codes are made anew for each of them."""

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"]

    def held(self) -> tuple[Tensor, Tensor]:
        return rows_to_codes(self.weight.detach(), self.code_kind)


# Products.


def multiplied(x: Tensor, codes: Tensor, *, gain: Tensor | None = None, scale: Tensor | None = None,
               bias: Tensor | None = None, hidden: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """(x * gain) (codes * scale)^T + bias + hidden factor^T in the dtype of x, whose codes are made on the way:
    [..., k], [n, k] -> [..., n].

    gain: [k, 1] or [1, 1], of the columns of x; scale: [n, 1] or [1, 1]; bias: [n]; hidden: [..., r]; factor: [n, r].
    """
    rows, own = codes_of_rows(x.detach().reshape(-1, x.shape[-1]), gain, codes.dtype)
    hidden = None if hidden is None else hidden.reshape(len(rows), -1)
    return product_of_codes(rows, codes, own, scale, bias, hidden, factor, x.dtype).view(*x.shape[:-1], len(codes))


# What a device can.


@cache
def fault(kind: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why a device cannot multiply so in a model of `dtype`, in words; None where it can."""
    normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    x, weight = (_held_exactly(normal(rows, 64), CODES[kind]).to(dtype) for rows in (64, 48))
    bias, hidden, factor = (normal(*size).to(dtype) for size in ((48,), (64, 16), (48, 16)))
    bias *= 8  # as large as the products
    try:
        codes, scale = rows_to_codes(weight, CODES[kind])
        y = multiplied(x, codes, scale=scale, bias=bias, hidden=hidden, factor=factor)
    except torch.OutOfMemoryError:  # says nothing of the kernels, and would be remembered
        raise
    except Exception as error:  # of torch, of Triton, of the compiler that it calls
        return f"the kernel for it could not be made or run here: {first_line(error)}"
    exact = torch.addmm(bias.float(), x.float(), weight.float().t()) + hidden.float() @ factor.float().t()
    return None if (y.float() - exact).abs().max() <= WRONG * exact.abs().max() else "the kernel gives wrong products"


def _held_exactly(x: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers like x that codes hold as they are, in rows of two sizes: those codes times powers of two. How a number
    between two codes is rounded is then no matter, and the product of the codes is that of the numbers."""
    sizes = 2.0 ** (torch.arange(len(x), device=x.device) % 2 - int(math.log2(top_of(kind))))
    return rows_to_codes(x, kind)[0].float() * sizes[:, None]


# A model's linears.


def able_linears(denoiser: nn.Module, kind: str) -> dict[str, nn.Module]:
    """The frozen linears of a model's blocks that could multiply so, by their paths: plain ones whose sides fit, and
    those stored in codes of the same kind."""
    stored = {path: module for path, module in denoiser.named_modules()
              if isinstance(module, RowScaledLinear) and (module.codes.dtype == torch.int8) == (kind == "int8")}
    return {path: module for path, module in (linears_in_blocks(denoiser) | stored).items()
            if module.in_features % STEP == 0 and module.out_features % STEP == 0}


def install(denoiser: nn.Module, low: LowBits) -> None:
    """Let linears multiply so; plain ones give their weights up for codes, one after the other."""
    for path in sorted(low.paths):
        module = denoiser.get_submodule(path)
        if is_plain(module):
            _encode(module, low)
        _become(module, LowBitLinear, low)


def try_out(denoiser: nn.Module, low: LowBits) -> None:
    """Let linears multiply so, only slower: `stop_trying` brings all back."""
    for path in low.paths:
        module = denoiser.get_submodule(path)
        _become(module, TrialLinear if is_plain(module) else LowBitLinear, low)


def stop_trying(denoiser: nn.Module, low: LowBits) -> None:
    """Give linears their own class back."""
    for path in low.paths:
        module = denoiser.get_submodule(path)
        _become(module, nn.Linear if is_plain(module) else RowScaledLinear, low)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear still has its weight, not codes."""
    return "weight" in module._parameters


def both_ways(layer: nn.Module, kind: str) -> list[tuple[Product, Product]]:
    """A linear's product and its input's gradient, as it makes them and in 8 bits, to be timed beside one another."""
    if is_plain(layer):
        weight, bias = layer.weight.detach(), layer.bias
        codes, scale = rows_to_codes(weight, CODES[kind])
        turned = codes.t().contiguous()
        whole = partial(F.linear, weight=weight, bias=bias), lambda grad: grad @ weight
        return [whole, (partial(multiplied, codes=codes, scale=scale, bias=bias),
                        partial(multiplied, codes=turned, gain=scale))]
    codes, scale = layer.codes, layer.scale
    return [(layer.product, layer.input_gradient),
            (partial(multiplied, codes=codes, scale=scale, bias=layer.bias),
             lambda grad: multiplied(grad, codes.t().contiguous(), gain=scale))]


def _encode(module: nn.Module, low: LowBits) -> None:
    weight = module._parameters.pop("weight").detach()
    codes, scale = rows_to_codes(weight, CODES[low.kind])
    module.compute_dtype = weight.dtype
    for name, tensor in (("codes", codes), ("scale", scale), ("turned", codes.t().contiguous())):
        module.register_buffer(name, tensor, persistent=False)


def _become(module: nn.Module, kind: type[nn.Module], low: LowBits) -> None:
    """Change the class of a linear, which may have an adapter."""
    module.code_kind = CODES[low.kind]
    module._buffers.setdefault("turned", None)
    module.__class__ = adapted_class(kind) if isinstance(module, AdaptedLayer) else kind
