"""dequantize on GPUs: one read, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, launch, power_of_two
from lowp.kernels.numerics import to_nearest
from torch import Tensor

from lowp.ops.library import GRANULARITIES, rows_cols

TILE = 4096
COLUMNS = 1024  # the widest tile: 16 codes a thread of two warps a row


@triton.jit(do_not_specialize=["rows"])
def _dequantize(codes, scale, y, rows: tl.int64, cols: tl.int64, block: tl.int64,
                per_row: tl.int64, R: tl.constexpr, C: tl.constexpr, GRANULARITY: tl.constexpr):
    """A tile of R rows and C columns; GRANULARITY: csrc/kernel.h."""
    across = tl.cdiv(cols, C)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // across * R + tl.arange(0, R)
    first = pid % across * C
    col = first + tl.arange(0, C)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    at = (row * cols)[:, None] + col[None, :]
    q = tl.load(codes + at, mask=mask, other=0).to(tl.float32)
    if GRANULARITY == 0:
        s = tl.load(scale + tl.zeros([1, 1], tl.int32))
    elif GRANULARITY == 1:
        s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    elif GRANULARITY == 2:
        s = tl.load(scale + col, mask=col < cols, other=0.0)[None, :]
    else:
        group = (row * per_row)[:, None] + (col // block)[None, :]
        s = tl.load(scale + group, mask=mask, other=0.0)
    tl.store(y + at, to_nearest(q * s, y.dtype.element_ty), mask=mask)


def dequantize(codes: Tensor, scale: Tensor, granularity: str, block: int,
               out_dtype: torch.dtype) -> Tensor:
    """The op :data:`lowp.ops.dequantize.dequantize`."""
    codes, scale = codes.contiguous(), scale.contiguous()
    y = torch.empty(codes.shape, dtype=out_dtype, device=codes.device)
    if codes.numel() == 0:
        return y
    rows, cols = rows_cols(codes)
    c = min(COLUMNS, power_of_two(max(cols, 16)))
    r = TILE // c
    per_row = scale.shape[-1] if granularity == "block" else 1
    launch(_dequantize, (triton.cdiv(cols, c) * triton.cdiv(rows, r),), codes, scale, y, rows, cols,
           block, per_row, R=r, C=c, GRANULARITY=GRANULARITIES[granularity], num_warps=8, **EXACT)
    return y
