"""Frozen linears that multiply in 8 bits, floats or integers: x W^T forward, and grad W for the gradient of x."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.adapters.layer import AdaptedLayer, adapted_class
from trainer.fast.compile import VARIANTS, compiler_missing
from trainer.quantize.linear import FP8, RowScaledLinear, rows_to_codes, with_scale
from trainer.quantize.model import linears_in_blocks

# Of weights, inputs and gradients alike: e5m2 has more range, which scales make needless, and half the precision.
CODES = {"fp8": FP8, "int8": torch.int8}
STEP = 16  # both sides of a weight are multiples of it: what the kernels ask for
FEWEST_ROWS = 32  # of an input; with fewer the product is made in the model's dtype
OUT = torch.bfloat16  # what products of 8-bit floats come in


class LowBits(NamedTuple):
    """How a model's frozen linears multiply, and which of them do."""

    kind: str  # of CODES
    by_row: bool  # whether floats have a scale for each row, or one for all
    paths: frozenset[str]  # within the denoiser


class LowBitLinear(RowScaledLinear):
    """x W^T + bias by a product of codes: those of W [m, n], and those of x, made as it comes.

    Each row of x has its own scale, so that samples do not change each other's numbers; where the kernels for floats
    have one scale for all, all of x has. The gradient of x is grad W by the same codes of W, whose scales go into grad
    before its own are made. Kernels want W in the order of its columns there: a linear that had 16 bits keeps its
    codes in both orders, which takes as much; one that was stored in 8 bits turns them over in each backward pass.
    """

    by_row: bool
    code_kind: torch.dtype
    turned: Tensor | None  # n m, of those that had 16 bits

    def product(self, x: Tensor) -> Tensor:
        if x.numel() < FEWEST_ROWS * x.shape[-1]:
            return super().product(x)
        codes, scale = self.held()
        return multiplied(x, codes, self.by_row, scale=scale, bias=self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        if grad.numel() < FEWEST_ROWS * grad.shape[-1]:
            return super().input_gradient(grad)
        codes, scale = self.held()
        turned = codes.t().contiguous() if self.turned is None else self.turned
        return multiplied(grad, turned, self.by_row, gain=scale)

    def held(self) -> tuple[Tensor, Tensor]:
        """Codes of W [m, n], and their scales [m, 1] or [1, 1]."""
        return self.codes, self.scale


class TrialLinear(LowBitLinear):
    """The same products while the weight is still there as it was: its codes are made anew for each of them."""

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"]

    def held(self) -> tuple[Tensor, Tensor]:
        return to_codes(self.weight.detach(), None, self.code_kind, self.by_row)


# Products.


def multiplied(x: Tensor, codes: Tensor, by_row: bool, *, gain: Tensor | None = None, scale: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    """(x * gain) (codes * scale)^T + bias in the dtype of x, its codes made on the way: [..., k], [n, k] -> [..., n].

    gain: [k, 1] or [1, 1], of the columns of x; scale: [n, 1] or [1, 1]; bias: [n].
    """
    kind = torch.int8 if codes.dtype == torch.int8 else FP8
    rows, own = in_one_kernel(to_codes, x.detach().reshape(-1, x.shape[-1]), gain, kind, by_row)
    if kind == torch.int8:
        y = in_one_kernel(from_total, torch._int_mm(rows, codes.t()), own, scale, bias, x.dtype)
    else:
        y = of_floats(rows, own, codes, scale, bias).to(x.dtype)
    return y.view(*x.shape[:-1], len(codes))


def to_codes(x: Tensor, gain: Tensor | None, kind: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """Codes of x * gain [m, k], and their scales [m, 1]; [1, 1] for floats with one scale for all."""
    if gain is not None:
        x = x.float() * gain.t()
    if by_row or kind == torch.int8:
        return rows_to_codes(x, kind)
    return with_scale(x, x.abs().amax().view(1, 1), kind)


def from_total(total: Tensor, own: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product [m, n] from the sum of products of integers."""
    y = total.float() * own
    y = y if scale is None else y * scale.t()
    return (y if bias is None else y + bias).to(dtype)


def of_floats(x: Tensor, own: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product [m, n] of codes [m, k] and [n, k] in 8-bit floats.

    torch's kernel takes a scale a row for both or one number for both: what is otherwise comes after it.
    """
    if scale is not None and scale.numel() == 1:
        own, scale = own * scale, None
    by_row = own.numel() > 1
    after = scale is not None and not by_row
    inner = own.new_ones(1, len(codes) if by_row else 1) if scale is None or after else scale.t()
    added = bias if bias is not None and bias.dtype == OUT and not after else None
    y = torch._scaled_mm(x, codes.t(), own, inner, bias=added, out_dtype=OUT, use_fast_accum=True)
    y = y * scale.t() if after else y
    return y if bias is None or added is not None else y + bias


def in_one_kernel(function: Callable, x: Tensor, *others: Tensor | torch.dtype | bool | None) -> Tensor:
    """What a function of elements and rows gives, compiled by itself where nothing around it is compiled.

    Its plain operations would read and write x several times. It is compiled for each width, and for any number of
    rows of x and of what has as many.
    """
    if torch.compiler.is_compiling() or x.device.type != "cuda" or compiler_missing():
        return function(x, *others)
    for tensor in (x, *(other for other in others if isinstance(other, Tensor))):
        if tensor.ndim > 1 and len(tensor) == len(x):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.mark_static(tensor, tensor.ndim - 1)
    return compiled(function)(x, *others)


@cache
def compiled(function: Callable) -> Callable:
    """The compiled function; widths of layers, kinds of codes and gains are compiled each for itself."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    return torch.compile(function)


# What a device can.


@cache
def fault(kind: str, device: torch.device) -> str | None:
    """Why a device cannot multiply so, in words; None where it can."""
    by_row = kind == "int8" or scales_by_row(device)
    return None if by_row and kind == "fp8" else _wrong(kind, by_row, device)


@cache
def scales_by_row(device: torch.device) -> bool:
    """Whether the kernels for 8-bit floats take a scale for each row: Hopper's do, others' as torch brings them."""
    return _wrong("fp8", True, device) is None


def _wrong(kind: str, by_row: bool, device: torch.device) -> str | None:
    x, weight = torch.rand(50, 64, device=device) + 1, torch.rand(48, 64, device=device) + 1
    bias = torch.ones(48, device=device)
    try:
        codes, scale = to_codes(weight, None, CODES[kind], by_row)
        y = multiplied(x.to(OUT), codes, by_row, scale=scale, bias=bias.to(OUT))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    good = torch.allclose(y.float(), torch.addmm(bias, x, weight.t()), rtol=0.05)
    return None if good else "the kernels give wrong products"


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


def _encode(module: nn.Module, low: LowBits) -> None:
    weight = module._parameters.pop("weight").detach()
    codes, scale = to_codes(weight, None, CODES[low.kind], low.by_row)
    module.compute_dtype = weight.dtype
    for name, tensor in (("codes", codes), ("scale", scale), ("turned", codes.t().contiguous())):
        module.register_buffer(name, tensor, persistent=False)


def _become(module: nn.Module, kind: type[nn.Module], low: LowBits) -> None:
    """Change the class of a linear, which may have an adapter."""
    module.by_row, module.code_kind = low.by_row, CODES[low.kind]
    module._buffers.setdefault("turned", None)
    module.__class__ = adapted_class(kind) if isinstance(module, AdaptedLayer) else kind
