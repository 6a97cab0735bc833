"""quantize on GPUs: one read of rows or blocks held in registers, two of tensors and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, KEY, KeyArguments, key_arguments, launch, power_of_two
from lowp.kernels.numerics import draws, int8_code, int8_scale, magnitude_bits, widen
from torch import Tensor

from lowp.ops.library import rows_cols
from lowp.ops.quantize import outputs

TILE = 4096  # elements a program holds, 16 a thread of 8 warps
LONGEST = 16384  # a row up to this length is held in registers, 32 elements a thread of 16 warps


@triton.jit
def scaled_codes(x, inv_scale, draw, STOCHASTIC: tl.constexpr):
    """Codes of fp32 ``x``; a group without a scale has codes 0, whatever it holds."""
    v = tl.where(inv_scale == 0.0, 0.0, x * inv_scale)
    return int8_code(v, draw, STOCHASTIC)


@triton.jit(do_not_specialize=["groups", *KEY])
def _groups(x, codes, scale, groups: tl.int64, per_row: tl.int64, cols: tl.int64, width: tl.int64,
            seed_low: tl.int64, seed_high: tl.int64, step_pointer, step: tl.int64,
            tensor: tl.int64, role: tl.int64, offset: tl.int64, R: tl.constexpr, C: tl.constexpr,
            BLOCKED: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr):
    """R rows, or blocks of rows, each inside one tile of C columns."""
    group = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if BLOCKED:
        before = group % per_row * width  # columns of the row before the block
        start = group // per_row * cols + before
    else:
        before = group * 0
        start = group * cols
    c = tl.arange(0, C)
    mask = (group < groups)[:, None] & (c < width)[None, :]
    mask = mask & (before[:, None] + c[None, :] < cols)
    at = start[:, None] + c[None, :]
    value = widen(tl.load(x + at, mask=mask, other=0.0))
    group_scale, inv_scale = int8_scale(tl.max(magnitude_bits(value), axis=1))
    if STOCHASTIC:
        now = step if step_pointer is None else tl.load(step_pointer)
        draw = draws(offset + start, C, GROUPED, seed_low, seed_high, now, tensor, role)
    else:
        draw = 0
    tl.store(codes + at, scaled_codes(value, inv_scale[:, None], draw, STOCHASTIC), mask=mask)
    tl.store(scale + group, group_scale, mask=group < groups)


@triton.jit(do_not_specialize=["groups", *KEY])
def _long_groups(x, codes, scale, groups: tl.int64, per_row: tl.int64, cols: tl.int64,
                 width: tl.int64, seed_low: tl.int64, seed_high: tl.int64, step_pointer,
                 step: tl.int64, tensor: tl.int64, role: tl.int64, offset: tl.int64,
                 C: tl.constexpr, STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr):
    """One row or block by tiles: for its scale, then backwards, out of the cache, for its codes."""
    group = tl.program_id(0).to(tl.int64)
    before = group % per_row * width
    start = group // per_row * cols + before
    c = tl.arange(0, C)
    amax = tl.zeros([C], tl.int32)
    tiles = tl.cdiv(width, C)
    for i in range(tiles):
        at = i * C + c
        mask = (at < width) & (before + at < cols)
        value = widen(tl.load(x + start + at, mask=mask, other=0.0))
        amax = tl.maximum(amax, magnitude_bits(value))
    group_scale, inv_scale = int8_scale(tl.max(tl.reshape(amax, [1, C]), axis=1))
    tl.store(scale + group + tl.arange(0, 1), group_scale)
    now = step if step_pointer is None else tl.load(step_pointer)
    for j in range(tiles):
        first = (tiles - 1 - j) * C
        at = first + c[None, :]
        mask = (at < width) & (before + at < cols)
        value = widen(tl.load(x + start + at, mask=mask, other=0.0))
        if STOCHASTIC:
            e = offset + start + first + tl.zeros([1], tl.int64)
            draw = draws(e, C, GROUPED, seed_low, seed_high, now, tensor, role)
        else:
            draw = 0
        code = scaled_codes(value, inv_scale[:, None], draw, STOCHASTIC)
        tl.store(codes + start + at, code, mask=mask)


@triton.jit(do_not_specialize=["n"])
def _tensor_amax(x, amax, n: tl.int64, C: tl.constexpr, EVEN: tl.constexpr):
    """The largest magnitude bits of n elements; EVEN: n is a multiple of 16."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    end = n // 16 * 16 if EVEN else n
    value = widen(tl.load(x + at, mask=at < end, other=0.0))
    tl.atomic_max(amax, tl.max(magnitude_bits(value), axis=0))


@triton.jit(do_not_specialize=["rows"])
def _column_amax(x, amax, rows: tl.int64, cols: tl.int64, R: tl.constexpr, C: tl.constexpr,
                 STEPS: tl.constexpr):
    """The largest magnitude bits of C columns over STEPS tiles of R rows."""
    c = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    row = tl.program_id(1).to(tl.int64) * (R * STEPS) + tl.arange(0, R)
    found = tl.zeros([R, C], tl.int32)
    for _ in range(STEPS):
        mask = (row < rows)[:, None] & (c < cols)[None, :]
        value = widen(tl.load(x + row[:, None] * cols + c[None, :], mask=mask, other=0.0))
        found = tl.maximum(found, magnitude_bits(value))
        row += R
    tl.atomic_max(amax + c, tl.max(found, axis=0), mask=c < cols)


@triton.jit(do_not_specialize=["rows", "n", *KEY])
def _by_amax(x, codes, scale, amax, rows: tl.int64, cols: tl.int64, n: tl.int64,
             seed_low: tl.int64, seed_high: tl.int64, step_pointer, step: tl.int64,
             tensor: tl.int64, role: tl.int64, offset: tl.int64, R: tl.constexpr, C: tl.constexpr,
             COLUMN: tl.constexpr, EVEN: tl.constexpr, STOCHASTIC: tl.constexpr,
             GROUPED: tl.constexpr):
    """Codes by known largest magnitudes, of the columns or (a flat tensor: rows = 1) of everything.

    The last tiles come first, for they are what the pass before has left in the cache.
    """
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    if COLUMN:
        across = tl.cdiv(cols, C)
        row = pid // across * R + tl.arange(0, R)
        first = pid % across * C
        end = cols
        start = row * cols + first
    else:
        row = tl.zeros([R], tl.int64)
        first = pid * C
        end = n // 16 * 16 if EVEN else n
        start = row + first
    c = first + tl.arange(0, C)
    mask = (row < rows)[:, None] & (c < end)[None, :]
    at = start[:, None] + tl.arange(0, C)[None, :]
    value = widen(tl.load(x + at, mask=mask, other=0.0))
    if COLUMN:
        found, inv_scale = int8_scale(tl.load(amax + c, mask=c < cols, other=0))
        if pid < across:
            tl.store(scale + c, found, mask=c < cols)
    else:
        found, inv_scale = int8_scale(tl.load(amax + tl.zeros([1], tl.int32)))
        if pid == 0:
            tl.store(scale + tl.arange(0, 1), found)
    if STOCHASTIC:
        now = step if step_pointer is None else tl.load(step_pointer)
        draw = draws(offset + start, C, GROUPED, seed_low, seed_high, now, tensor, role)
    else:
        draw = 0
    tl.store(codes + at, scaled_codes(value, inv_scale[None, :], draw, STOCHASTIC), mask=mask)


def _rows_or_blocks(x: Tensor, codes: Tensor, scale: Tensor, width: int, key: KeyArguments,
                    offset: int, stochastic: bool) -> None:
    cols = x.shape[-1]
    grouped = cols % 8 == 0 and width % 8 == 0 and offset % 8 == 0
    groups, per_row = scale.numel(), scale.shape[-1]
    if width > LONGEST:
        launch(_long_groups, (groups,), x, codes, scale, groups, per_row, cols, width, *key, offset,
               C=TILE, STOCHASTIC=stochastic, GROUPED=grouped, num_warps=8, **EXACT)
        return
    c = power_of_two(max(width, 16))
    r = max(1, TILE // c)
    launch(_groups, (triton.cdiv(groups, r),), x, codes, scale, groups, per_row, cols, width, *key,
           offset, R=r, C=c, BLOCKED=width != cols, STOCHASTIC=stochastic, GROUPED=grouped,
           num_warps=max(4, min(16, r * c // 512)), **EXACT)


def _by_columns(x: Tensor, codes: Tensor, scale: Tensor, amax: Tensor, key: KeyArguments,
                offset: int, stochastic: bool) -> None:
    rows, cols = rows_cols(x)
    r, c, steps = 32, 128, 8
    launch(_column_amax, (triton.cdiv(cols, c), triton.cdiv(rows, r * steps)), x, amax, rows, cols,
           R=r, C=c, STEPS=steps, num_warps=8, **EXACT)
    # without rows one program still writes the scales
    grid = (triton.cdiv(cols, c) * max(1, triton.cdiv(rows, r)),)
    launch(_by_amax, grid, x, codes, scale, amax, rows, cols, rows * cols, *key, offset, R=r, C=c,
           COLUMN=True, EVEN=cols % 16 == 0, STOCHASTIC=stochastic,
           GROUPED=cols % 8 == 0 and offset % 8 == 0, num_warps=8, **EXACT)


def _by_tensor(x: Tensor, codes: Tensor, scale: Tensor, amax: Tensor, key: KeyArguments,
               offset: int, stochastic: bool) -> None:
    n, even = x.numel(), x.shape[-1] % 16 == 0
    launch(_tensor_amax, (triton.cdiv(n, TILE),), x, amax, n, C=TILE, EVEN=even, num_warps=8,
           **EXACT)
    launch(_by_amax, (max(1, triton.cdiv(n, TILE)),), x, codes, scale, amax, 1, x.shape[-1], n,
           *key, offset,
           R=1, C=TILE, COLUMN=False, EVEN=even, STOCHASTIC=stochastic, GROUPED=offset % 8 == 0,
           num_warps=8, **EXACT)


def quantize(x: Tensor, granularity: str, block: int, rounding: str, seed: int, step: Tensor | None,
             tensor: int, role: int, offset: int) -> tuple[Tensor, Tensor]:
    """The op :data:`lowp.ops.quantize.quantize`."""
    x = x.contiguous()
    codes, scale = outputs(x, granularity, block)
    key = key_arguments(x, seed, step, tensor, role)
    stochastic = rounding == "stochastic"
    if granularity in ("row", "block"):
        width = x.shape[-1] if granularity == "row" else min(block, x.shape[-1])
        _rows_or_blocks(x, codes, scale, width, key, offset, stochastic)
        return codes, scale
    by = _by_tensor if granularity == "tensor" else _by_columns
    amax = torch.zeros(scale.shape, dtype=torch.int32, device=x.device)
    by(x, codes, scale, amax, key, offset, stochastic)
    return codes, scale
