"""codes * scale as a GPU's kernel, in Triton: torch's own operations for it read and write the weight twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 4, 1024, 4  # of W that a program makes


@triton.jit
def _scaled(codes, scale, out, m, n, scale_step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, spot = (row[:, None] < m) & (column[None, :] < n), row[:, None] * n + column[None, :]
    factor = tl.load(scale + row * scale_step, mask=row < m, other=0.0)
    made = tl.load(codes + spot, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(out + spot, made.to(out.dtype.element_ty), mask=inside)


def scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [m, n] times scale [m, 1] or [1, 1] (fp32), rounded once to `dtype`."""
    m, n = codes.shape
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    with torch.cuda.device(codes.device):
        _scaled[(triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS))](
            codes, scale, out, m, n, 0 if scale.numel() == 1 else 1, ROWS, COLUMNS, num_warps=WARPS)
    return out
