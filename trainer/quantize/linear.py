"""Frozen linears whose weight is held in 8 or 4 bits, and multiplied at the precision of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.quantize import kernels

FP8 = torch.float8_e4m3fn
LEAST = 1e-30  # a row's largest number: its scale is then a normal float
NF4_BLOCK, SCALE_BLOCK = 64, 256  # weights that share a scale; scales that share one: QLoRA's (Dettmers et al. 2023)


class QuantizedLinear(nn.Module):
    """x W^T + bias with a frozen W that is stored small; stands in an `nn.Linear`'s place, and takes an adapter.

    Only the storage is quantised: W is made whole in the model's dtype for each product and let go after it, in the
    forward pass and again for the gradient of the input, which is thus exactly that of the same function. The storage
    is buffers, so that it moves with the module; none is saved.
    """

    parts: tuple[str, ...]  # the buffers that W is made from

    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.compute_dtype = dtype

    @property
    def weight(self) -> Tensor:
        """W [out, in] in the compute dtype, made afresh each time."""
        return whole(self.stored, self.shape, self.compute_dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """That of W."""
        return self.out_features, self.in_features

    @property
    def stored(self) -> list[Tensor]:
        """What W is made from."""
        return [getattr(self, name) for name in self.parts]

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return FrozenProduct.apply(x, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias: [..., n] -> [..., m], without a record for gradients."""
        if torch.compiler.is_compiling():
            return stored_product(x, self.stored, self.shape, self.compute_dtype, self.bias)
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad W: the gradient of x, [..., m] -> [..., n]."""
        if torch.compiler.is_compiling():
            return stored_gradient(grad, self.stored, self.shape, self.compute_dtype)
        return grad @ self.weight.to(grad.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _store(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class FrozenProduct(torch.autograd.Function):
    """x W^T + bias that keeps nothing: plain autograd would keep the dequantised W until the backward pass.

    It saves an empty tensor all the same: where blocks are checkpointed, the first that is read of what a block saved
    runs the block again, and so fetches weights that lie elsewhere meanwhile, or are still on their way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors  # before the weight is
        return ctx.layer.input_gradient(grad), None


class RowScaledLinear(QuantizedLinear):
    """W = codes * scale: int8 or float8 codes [m, n] and an fp32 scale for each row [m, 1], or for all [1, 1]."""

    parts = ("codes", "scale")

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(codes.shape, bias, dtype)
        self._store(codes=codes, scale=scale.to(codes.device, torch.float32, copy=True).view(-1, 1))


class Nf4Linear(QuantizedLinear):
    """W as 4-bit normal floats with doubly quantised scales, by bitsandbytes: 4.13 bits a weight.

    Its blocks of 64 run through the rows; the last one is filled up with zeros.
    """

    parts = ("packed", "absmax", "absmax_scale", "absmax_mean")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.shape, bias, dtype)
        weight = weight if weight.dtype in kernels.FLOATS else weight.float()
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        packed, state = kernels.bitsandbytes().quantize_4bit(blocks, blocksize=NF4_BLOCK, compress_statistics=True,
                                                             quant_type="nf4")
        self._store(packed=packed, absmax=state.absmax, absmax_scale=state.state2.absmax, absmax_mean=state.offset)


def int8_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> RowScaledLinear:
    """W in LLM.int8()'s rows (Dettmers et al. 2022), quantised by bitsandbytes.

    Its own product is not used: it rounds the inputs to 8 bits as well, from fp16, in which Flux's overflow.
    """
    codes, absmax, _ = kernels.bitsandbytes().int8_vectorwise_quant(weight.half())
    return RowScaledLinear(codes, absmax / 127, bias, dtype)


def fp8_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> RowScaledLinear:
    """W in e4m3 with the scale that takes each row's largest weight to the largest code."""
    return RowScaledLinear(*rows_to_codes(weight, FP8), bias, dtype)


def rows_to_codes(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [m, n] in int8 or a float8, and the fp32 scale of each row [m, 1] that takes its largest to the largest
    code; what is not finite stays so in codes * scale."""
    top = top_of(kind)
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=LEAST) / top
    codes = (x / scale).clamp(-top, top)
    return (codes.round() if kind == torch.int8 else codes).to(kind), scale


def top_of(kind: torch.dtype) -> float:
    """The largest code."""
    return 127.0 if kind == torch.int8 else torch.finfo(kind).max


# W from what is stored.


def whole(stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """W of a shape [m, n] from the `parts` of a layer: four of NF4, or codes and their scale."""
    if len(stored) == len(Nf4Linear.parts):
        return _from_nf4(*stored, dtype)[: math.prod(shape)].view(*shape).to(dtype)
    codes, scale = stored
    if codes.is_cuda and codes.is_contiguous() and in_one_pass(codes.dtype, dtype, codes.device):
        from trainer.quantize import whole_kernel  # late: Triton is only where there is a GPU for it

        return whole_kernel.scaled(codes, scale, dtype)
    return scaled(codes, scale, dtype)


def scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale; codes are exact in every compute dtype, and the product is rounded once, from fp32."""
    return codes.to(dtype).mul_(scale)


@cache
def in_one_pass(kind: torch.dtype, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel makes W on this GPU, the same to the bit: it needs Triton and a compiler of C."""
    codes = torch.arange(-100, 100, device=device).repeat(2, 1).to(kind)
    scale = torch.tensor([[0.3], [7e-4]], device=device)
    try:
        from trainer.quantize import whole_kernel  # late, as above

        return torch.equal(whole_kernel.scaled(codes, scale, dtype), scaled(codes, scale, dtype))
    except torch.OutOfMemoryError:  # says nothing of the kernels, and would be remembered
        raise
    except Exception:  # of Triton, or of the compiler that it calls: torch's own operations do
        return False


def _from_nf4(packed: Tensor, absmax: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, dtype: torch.dtype) -> Tensor:
    """All weights in a row, in the dtype or else in fp32."""
    library = kernels.bitsandbytes()
    scales = library.dequantize_blockwise(absmax, absmax=absmax_scale, blocksize=SCALE_BLOCK,
                                          code=kernels.scale_codes(absmax.device)).add_(absmax_mean)
    state = library.QuantState(scales, (len(scales), NF4_BLOCK), blocksize=NF4_BLOCK, quant_type="nf4",
                               dtype=dtype if dtype in kernels.FLOATS else torch.float32)
    return library.dequantize_4bit(packed, state).flatten()


# Operators: the compiler takes them as they are. Traced, the W of the forward pass and that of the backward pass would
# be one and the same to it, which it could keep from the one to the other. A call takes 7 us of the host, so that
# nothing else goes by way of them.


@torch.library.custom_op("stiefel_studio::stored_product", mutates_args=())
def stored_product(x: Tensor, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype,
                   bias: Tensor | None) -> Tensor:
    """x W^T + bias: [..., n] -> [..., m], by the W of `whole`."""
    return F.linear(x, whole(stored, shape, dtype), bias)


@stored_product.register_fake
def _(x: Tensor, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("stiefel_studio::stored_gradient", mutates_args=())
def stored_gradient(grad: Tensor, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """grad W: [..., m] -> [..., n]."""
    return grad @ whole(stored, shape, dtype).to(grad.dtype)


@stored_gradient.register_fake
def _(grad: Tensor, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])
