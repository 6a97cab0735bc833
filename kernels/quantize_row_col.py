"""quantize_row_col on GPUs: one read for all scales, one read for both sets of codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, KEY, key_arguments, launch
from lowp.kernels.numerics import draws, int8_scale, magnitude_bits, widen
from lowp.kernels.quantize import scaled_codes
from torch import Tensor

from lowp.ops.quantize_row_col import outputs

ROWS, COLS = 64, 64  # a tile: 16 bytes of codes a thread, in both directions


@triton.jit(do_not_specialize=["rows"])
def _amax(x, row_amax, col_amax, rows: tl.int64, cols: tl.int64, R: tl.constexpr,
          C: tl.constexpr):
    """The largest magnitude bits of the rows and the columns of a tile."""
    across = tl.cdiv(cols, C)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // across * R + tl.arange(0, R)
    col = pid % across * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    value = widen(tl.load(x + row[:, None] * cols + col[None, :], mask=mask, other=0.0))
    bits = magnitude_bits(value)
    tl.atomic_max(row_amax + row, tl.max(bits, axis=1), mask=row < rows)
    tl.atomic_max(col_amax + col, tl.max(bits, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=["rows", "col_role", *KEY])
def _codes(x, codes, scale, col_codes, col_scale, row_amax, col_amax, rows: tl.int64,
           cols: tl.int64, seed_low: tl.int64, seed_high: tl.int64, step_pointer, step: tl.int64,
           tensor: tl.int64, role: tl.int64, col_role: tl.int64, offset: tl.int64,
           R: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr):
    """Both codes of a tile, the last tiles first, for they are in the cache.

    Codes by column are written turned. Whether their rows of length ``rows`` keep 16-byte stores
    aligned is asked here and not by another kernel for other ``rows``.
    """
    across = tl.cdiv(cols, C)
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row = pid // across * R + tl.arange(0, R)
    first = pid % across * C
    col = first + tl.arange(0, C)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    start = row * cols + first
    at = start[:, None] + tl.arange(0, C)[None, :]
    value = widen(tl.load(x + at, mask=mask, other=0.0))
    found, inv_scale = int8_scale(tl.load(row_amax + row, mask=row < rows, other=0))
    col_found, col_inv_scale = int8_scale(tl.load(col_amax + col, mask=col < cols, other=0))
    if first == 0:
        tl.store(scale + row, found, mask=row < rows)
    if pid < across:
        tl.store(col_scale + col, col_found, mask=col < cols)
    draw = 0
    col_draw = 0
    if STOCHASTIC:
        now = step if step_pointer is None else tl.load(step_pointer)
        draw = draws(offset + start, C, GROUPED, seed_low, seed_high, now, tensor, role)
        col_draw = draws(offset + start, C, GROUPED, seed_low, seed_high, now, tensor, col_role)
    tl.store(codes + at, scaled_codes(value, inv_scale[:, None], draw, STOCHASTIC), mask=mask)
    turned = tl.trans(scaled_codes(value, col_inv_scale[None, :], col_draw, STOCHASTIC))
    if rows % 16 == 0:
        even = rows // 16 * 16  # equal, and known to the compiler as a multiple
        to = col[:, None] * even + row[None, :]
        tl.store(col_codes + to, turned, mask=(col < cols)[:, None] & (row < even)[None, :])
    else:
        to = col[:, None] * rows + row[None, :]
        tl.store(col_codes + to, turned, mask=(col < cols)[:, None] & (row < rows)[None, :])


def quantize_row_col(x: Tensor, rounding: str, seed: int, step: Tensor | None, tensor: int,
                     row_role: int, col_role: int, offset: int) -> tuple[Tensor, ...]:
    """The op :data:`lowp.ops.quantize_row_col.quantize_row_col`."""
    x = x.contiguous()
    rows, cols = x.shape
    codes, scale, col_codes, col_scale = outputs(x)
    amax = torch.zeros(rows + cols, dtype=torch.int32, device=x.device)
    row_amax, col_amax = amax[cols:], amax[:cols]
    down, across = triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS)
    launch(_amax, (down * across,), x, row_amax, col_amax, rows, cols, R=ROWS, C=COLS, num_warps=8,
           **EXACT)
    if x.numel() == 0:
        scale.zero_()
        col_scale.zero_()
        return codes, scale, col_codes, col_scale
    key = key_arguments(x, seed, step, tensor, row_role)
    launch(_codes, (down * across,), x, codes, scale, col_codes, col_scale, row_amax, col_amax,
           rows, cols, *key, col_role, offset, R=ROWS, C=COLS,
           STOCHASTIC=rounding == "stochastic", GROUPED=cols % 8 == 0 and offset % 8 == 0,
           num_warps=8, **EXACT)
    return codes, scale, col_codes, col_scale
