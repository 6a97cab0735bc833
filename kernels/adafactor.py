"""adafactor on GPUs: one launch a stage for all tensors of the same types; sums in their order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lowp.kernels import launch as launches
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import canonical_nan, divide_fp64, widen
from lowp.kernels.square_sums import LANES, RUN, lane_sums, run_sum
from lowp.kernels.update import (
    ALIGNED,
    EXTRA,
    ROW,
    WIDTH,
    advance,
    chunk_of,
    counted,
    load_weight,
    members_of,
    noise_of,
    pointer,
    store_weight,
)
from torch import Tensor

from lowp.ops import update
from lowp.ops.adafactor import matrices_of

R, COLS = 16, 256  # sums of rows and runs, and of columns, at a time: a warp's threads take 8 each
MATRICES, ROWS, WIDE, FIRST_RUN, FIRST_MATRIX = (
    tl.constexpr(EXTRA.value + i) for i in range(5))


@triton.jit
def power_of(step, exponent):
    """step^exponent by IEEE operations of one order (lowp/reference/adafactor.py)."""
    bits = step.to(tl.float64).to(tl.int64, bitcast=True)
    power = (bits >> 52) - 1022
    mantissa = ((bits & ((1 << 52) - 1)) | (1022 << 52)).to(tl.float64, bitcast=True)
    low = mantissa < 0.70710678118654757
    mantissa = tl.where(low, mantissa * 2.0, mantissa)
    power = tl.where(low, power - 1, power).to(tl.float64)
    one = tl.full(step.shape, 1.0, tl.float64)
    s = divide_fp64(mantissa - one, mantissa + one)
    series = tl.zeros(step.shape, tl.float64)
    for n in tl.static_range(11):
        series = series * (s * s) + divide_fp64(one, 21 - 2 * n)
    y = exponent * (power + s * series * 2.8853900817779268)  # 2 / ln 2
    whole = tl.floor(y + 0.5)
    f = (y - whole) * 0.69314718055994529
    result = one
    for n in tl.static_range(13):
        result = divide_fp64(result * f, 13 - n) + one
    return result * ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["tensors"])
def _weights(scalars, steps, tensors: tl.int64, beta2_decay: tl.float64, N: tl.constexpr):
    """scalars[1]: the weight of the newest squares."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    now = tl.maximum(tl.load(steps + i, mask=i < tensors, other=1), 1)
    tl.store(scalars + i * 4 + 1, power_of(now, beta2_decay).to(tl.float32), mask=i < tensors)


@triton.jit
def _moved(at, fresh, weight, mask):
    mean = tl.load(at, mask=mask, other=0.0)
    tl.store(at, canonical_nan(mean + (fresh.to(tl.float32) - mean) * weight), mask=mask)


@triton.jit
def _row_means_of(entry, scalars, G: tl.constexpr, R: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    grad, row_var = pointer(entry, 1, G, ALIGNED_ROW), pointer(entry, 2, tl.float32, False)
    cols = tl.load(entry + WIDE)
    if ALIGNED_ROW:
        cols = cols // 16 * 16
    rows = tl.load(entry + MATRICES) * tl.load(entry + ROWS)
    weight, unscale = tl.load(scalars + 1), tl.load(scalars + 3)
    lane = tl.arange(0, LANES)
    stride = tl.num_programs(0).to(tl.int64) * R
    for first in range(tl.program_id(0).to(tl.int64) * R, rows, stride):
        row = first + tl.arange(0, R)
        lanes = tl.zeros([R, LANES], tl.float64)
        for c in range(0, cols, LANES):
            mask = (row < rows)[:, None] & (c + lane < cols)[None, :]
            at = (row * cols)[:, None] + (c + lane)[None, :]
            g = (widen(tl.load(grad + at, mask=mask, other=0)) * unscale).to(tl.float64)
            lanes += g * g
        _moved(row_var + row, divide_fp64(lane_sums(lanes), cols.to(tl.float64)), weight,
               row < rows)


@triton.jit
def _row_means(table, scalars, steps, G: tl.constexpr, R: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    entry = table + index * ROW
    if tl.load(steps + index) > 0:
        if (tl.load(entry + ALIGNED) == 1) & (tl.load(entry + WIDE) % 16 == 0):
            _row_means_of(entry, scalars + index * 4, G, R, True)
        else:
            _row_means_of(entry, scalars + index * 4, G, R, False)


@triton.jit
def _column_means_of(entry, scalars, G: tl.constexpr, C: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    grad, col_var = pointer(entry, 1, G, ALIGNED_ROW), pointer(entry, 3, tl.float32, ALIGNED_ROW)
    cols, rows = tl.load(entry + WIDE), tl.load(entry + ROWS)
    if ALIGNED_ROW:
        cols = cols // 16 * 16
    weight, unscale = tl.load(scalars + 1), tl.load(scalars + 3)
    tiles = (cols + C - 1) // C
    for tile in range(tl.program_id(0).to(tl.int64), tl.load(entry + MATRICES) * tiles,
                      tl.num_programs(0).to(tl.int64)):
        matrix, col = tile // tiles, tile % tiles * C + tl.arange(0, C)
        at = matrix * rows * cols + col
        total = tl.zeros([C], tl.float64)
        for _ in range(rows):
            g = (widen(tl.load(grad + at, mask=col < cols, other=0)) * unscale).to(tl.float64)
            total += g * g
            at += cols
        _moved(col_var + matrix * cols + col, divide_fp64(total, rows.to(tl.float64)), weight,
               col < cols)


@triton.jit
def _column_means(table, scalars, steps, G: tl.constexpr, C: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    entry = table + index * ROW
    if tl.load(steps + index) > 0:
        if (tl.load(entry + ALIGNED) == 1) & (tl.load(entry + WIDE) % 16 == 0):
            _column_means_of(entry, scalars + index * 4, G, C, True)
        else:
            _column_means_of(entry, scalars + index * 4, G, C, False)


@triton.jit
def _matrix_means(table, steps, means, eps1: tl.float32, R: tl.constexpr):
    """Of the rows' variances."""
    index = tl.program_id(1).to(tl.int64)
    entry = table + index * ROW
    row_var = pointer(entry, 2, tl.float32, False)
    matrices, rows = tl.load(entry + MATRICES), tl.load(entry + ROWS)
    lane = tl.arange(0, LANES)
    stride = tl.num_programs(0).to(tl.int64) * R
    for first in range(tl.program_id(0).to(tl.int64) * R, matrices, stride):
        matrix = first + tl.arange(0, R)
        lanes = tl.zeros([R, LANES], tl.float64)
        for r in range(0, rows, LANES):
            mask = (matrix < matrices)[:, None] & (r + lane < rows)[None, :]
            at = (matrix * rows)[:, None] + (r + lane)[None, :]
            lanes += tl.load(row_var + at, mask=mask, other=0.0).to(tl.float64)
        mean = divide_fp64(lane_sums(lanes), rows.to(tl.float64)).to(tl.float32)
        tl.store(means + tl.load(entry + FIRST_MATRIX) + matrix,
                 tl.where(mean < eps1, eps1, mean), mask=matrix < matrices)


@triton.jit
def _direction(entry, scalars, means, start, at, mask, eps1, G: tl.constexpr,
               ALIGNED_ROW: tl.constexpr):
    """g / sqrt(the second moment), 0 where there is nothing, and the moment, of 16 elements each
    from ``start`` on; ALIGNED_ROW: each 16 lie in one row."""
    grad = pointer(entry, 1, G, ALIGNED_ROW)
    u = widen(tl.load(grad + at, mask=mask, other=0)) * tl.load(scalars + 3)
    zero = tl.zeros(u.shape, tl.float32)
    if tl.load(entry + MATRICES) == 0:
        old = tl.load(pointer(entry, 4, tl.float32, ALIGNED_ROW) + at, mask=mask, other=0.0)
        v = canonical_nan(old + (u * u - old) * tl.load(scalars + 1))
    else:
        row_var = pointer(entry, 2, tl.float32, False)
        col_var = pointer(entry, 3, tl.float32, ALIGNED_ROW)
        cols, rows = tl.load(entry + WIDE), tl.load(entry + ROWS)
        means += tl.load(entry + FIRST_MATRIX)
        if ALIGNED_ROW:
            cols = cols // 16 * 16
            row = start // cols
            inside = tl.max(mask.to(tl.int32), axis=1) > 0
            of_row = tl.load(row_var + row, mask=inside, other=0.0)[:, None] + zero
            mean = tl.load(means + row // rows, mask=inside, other=1.0)[:, None] + zero
            place = (row // rows * cols - row * cols)[:, None] + at
        else:
            row = at // cols
            of_row = tl.load(row_var + row, mask=mask, other=0.0)
            mean = tl.load(means + row // rows, mask=mask, other=1.0)
            place = row // rows * cols - row * cols + at
        v = tl.div_rn(of_row * tl.load(col_var + place, mask=mask, other=0.0), mean)
    least = eps1 * eps1
    u = tl.div_rn(u, tl.sqrt_rn(tl.where(v < least, least, v)))
    return tl.where(mask, u, 0.0), v


@triton.jit
def _norms_of(entry, scalars, first, last, means, sums, runs, eps1, P: tl.constexpr,
              G: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    param = pointer(entry, 0, P, ALIGNED_ROW)
    width = tl.load(entry + WIDTH)
    if ALIGNED_ROW:
        width = width // 16 * 16
    end = tl.minimum(last * 256, width)
    for i in range(first * 256, last * 256, R * RUN):
        begin = i + tl.arange(0, R).to(tl.int64) * RUN
        weights, lanes = tl.zeros([R, LANES], tl.float64), tl.zeros([R, LANES], tl.float64)
        start = begin
        for _ in range(RUN // LANES):
            at = start[:, None] + tl.arange(0, LANES)[None, :]
            mask = at < end
            p = load_weight(entry, param, at, mask, REST, ALIGNED_ROW).to(tl.float64)
            weights += p * p
            u, _ = _direction(entry, scalars, means, start, at, mask, eps1, G, ALIGNED_ROW)
            u = u.to(tl.float64)
            lanes += u * u
            start += LANES
        to = sums + tl.load(entry + FIRST_RUN) + begin // RUN
        tl.store(to, lane_sums(weights), mask=begin < end)
        tl.store(to + runs, lane_sums(lanes), mask=begin < end)


@triton.jit(do_not_specialize=["chunk_blocks", "runs"])
def _norms(table, chunks, scalars, steps, means, sums, chunk_blocks: tl.int64, runs: tl.int64,
           eps1: tl.float32, P: tl.constexpr, G: tl.constexpr, REST: tl.constexpr,
           R: tl.constexpr):
    """Sums of squares of weights and directions, a run each."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    scalars += index * 4
    if tl.load(steps + index) > 0:
        if (tl.load(entry + ALIGNED) == 1) & (tl.load(entry + WIDE) % 16 == 0):
            _norms_of(entry, scalars, first, first + chunk_blocks, means, sums, runs, eps1, P, G,
                      REST, R, True)
        else:
            _norms_of(entry, scalars, first, first + chunk_blocks, means, sums, runs, eps1, P, G,
                      REST, R, False)


@triton.jit(do_not_specialize=["runs"])
def _sizes(table, scalars, steps, sums, lr_pointer, runs: tl.int64, lr: tl.float64,
           eps2: tl.float64, d: tl.float64):
    """scalars[0]: what multiplies the direction of one tensor."""
    index = tl.program_id(0).to(tl.int64)
    entry = table + index * ROW
    now, numel, first = tl.load(steps + index), tl.load(entry + WIDTH), tl.load(entry + FIRST_RUN)
    if (now > 0) & (numel > 0):
        lr_now = lr + tl.full([], 0.0, tl.float64)
        if lr_pointer is not None:
            lr_now = tl.load(lr_pointer).to(tl.float64)
        one = tl.full([], 1.0, tl.float64)
        rate = divide_fp64(one, tl.sqrt(now.to(tl.float64)))
        rate = tl.where(rate < lr_now, rate, lr_now)
        root = tl.sqrt(numel.to(tl.float64))
        rms = divide_fp64(tl.sqrt(run_sum(sums, first, numel)), root)
        alpha = tl.where(rms > eps2, rms, eps2) * rate
        cut = divide_fp64(tl.sqrt(run_sum(sums + runs, first, numel)), root * d)
        size = divide_fp64(alpha, tl.where(cut > 1.0, cut, one))
        tl.store(scalars + index * 4, size.to(tl.float32))


@triton.jit
def _move_of(entry, scalars, noise, first, last, means, eps1, P: tl.constexpr, G: tl.constexpr,
             REST: tl.constexpr, R: tl.constexpr, STOCHASTIC: tl.constexpr,
             ALIGNED_ROW: tl.constexpr):
    param = pointer(entry, 0, P, ALIGNED_ROW)
    width = tl.load(entry + WIDTH)
    if ALIGNED_ROW:
        width = width // 16 * 16
    end = tl.minimum(last * 256, width)
    size, decay = tl.load(scalars), tl.load(scalars + 2)
    for i in range(first * 256, last * 256, R * LANES):
        start = i + tl.arange(0, R).to(tl.int64) * LANES
        at = start[:, None] + tl.arange(0, LANES)[None, :]
        mask = at < end
        p = load_weight(entry, param, at, mask, REST, ALIGNED_ROW)
        u, v = _direction(entry, scalars, means, start, at, mask, eps1, G, ALIGNED_ROW)
        store_weight(canonical_nan(p * decay - u * size), entry, param, at, mask, start, noise,
                     REST, STOCHASTIC, ALIGNED_ROW)
        if tl.load(entry + MATRICES) == 0:
            tl.store(pointer(entry, 4, tl.float32, ALIGNED_ROW) + at, v, mask=mask)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _move(table, chunks, scalars, steps, means, chunk_blocks: tl.int64, seed_low: tl.int64,
          seed_high: tl.int64, eps1: tl.float32, P: tl.constexpr, G: tl.constexpr,
          REST: tl.constexpr, R: tl.constexpr, STOCHASTIC: tl.constexpr):
    """One chunk of one tensor a program; a tensor whose step is 0 is skipped."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    scalars, now = scalars + index * 4, tl.load(steps + index)
    noise = noise_of(entry, now, seed_low, seed_high)
    if now > 0:
        if (tl.load(entry + ALIGNED) == 1) & (tl.load(entry + WIDE) % 16 == 0):
            _move_of(entry, scalars, noise, first, first + chunk_blocks, means, eps1, P, G, REST, R,
                     STOCHASTIC, True)
        else:  # one draw an element: a quarter of the elements needs as many registers
            _move_of(entry, scalars, noise, first, first + chunk_blocks, means, eps1, P, G, REST,
                     R // 4, STOCHASTIC, False)


def adafactor(params: Sequence[Tensor], grads: Sequence[Tensor], row_vars: Sequence[Tensor],
              col_vars: Sequence[Tensor], variances: Sequence[Tensor], steps: Sequence[Tensor],
              lr: Tensor, beta2_decay: float, eps1: float, eps2: float, d: float,
              weight_decay: float, maximize: bool, rounding: str, seed: int,
              tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
              found_inf: Tensor | None, masters: Sequence[Tensor] | None = None) -> None:
    """The op :data:`lowp.ops.adafactor.adafactor`."""
    grads = [g.contiguous() for g in grads]
    bits = seed & (2**64 - 1)
    shapes = [matrices_of(p) for p in params]
    runs = list(itertools.accumulate((triton.cdiv(p.numel(), RUN.value) for p in params),
                                     initial=0))
    first = list(itertools.accumulate((matrices for matrices, _, _ in shapes), initial=0))
    extras = [(*shape, *starts) for shape, *starts in zip(shapes, runs, first, strict=False)]
    with update.contiguous_params(params) as work:
        lists = (work, grads, row_vars, col_vars, variances)
        members = members_of(lists, steps, tensors, offsets, masters, extras)
        for batch, on_device, (rest, p, g, *_) in counted(members, found_inf):
            count, device = len(batch.table), batch.table.device
            advance(batch, on_device, lr, 0.0, 0.0, weight_decay, maximize, grad_scale, found_inf)
            launch(_weights, (triton.cdiv(count, 128),), batch.scalars, batch.now, count,
                   beta2_decay, N=128, num_warps=4, **EXACT)
            sums = torch.empty(2, runs[-1], dtype=torch.float64, device=device)
            means = torch.empty(max(1, first[-1]), device=device)
            most = 4 * launches.processors(device)  # programs of one tensor: they walk over it
            rows = max(triton.cdiv(m * r, R) for m, r, _ in shapes)
            columns = max(m * triton.cdiv(c, COLS) for m, _, c in shapes)
            matrices = max(triton.cdiv(m, R) for m, _, _ in shapes)
            launch(_row_means, (min(most, rows), count), batch.table, batch.scalars, batch.now,
                   G=g, R=R, num_warps=1, **EXACT)
            launch(_column_means, (min(most, columns), count), batch.table, batch.scalars,
                   batch.now, G=g, C=COLS, num_warps=1, **EXACT)
            launch(_matrix_means, (min(most, matrices), count), batch.table, batch.now, means,
                   eps1, R=R, num_warps=1, **EXACT)
            launch(_norms, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, means, sums, batch.chunk_blocks, runs[-1], eps1, P=p, G=g, REST=rest,
                   R=R, num_warps=1, **EXACT)
            here = lr.device == device
            launch(_sizes, (count,), batch.table, batch.scalars, batch.now, sums,
                   lr if here else None, runs[-1], 0.0 if here else lr.item(), eps2, d,
                   num_warps=1, **EXACT)
            launch(_move, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, means, batch.chunk_blocks, bits & 0xFFFFFFFF, bits >> 32, eps1, P=p,
                   G=g, REST=rest, R=4 * R, STOCHASTIC=rounding == "stochastic", num_warps=4,
                   **EXACT)
