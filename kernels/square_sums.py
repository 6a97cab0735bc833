"""square_sums on GPUs: runs of 1024 side by side, then each tensor's in the contract's order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import widen
from lowp.kernels.update import (
    ALIGNED,
    OFFSET,
    TENSOR,
    WIDTH,
    batches,
    chunk_of,
    members_of,
    pointer,
)
from torch import Tensor

LANES, RUN = tl.constexpr(16), tl.constexpr(1024)  # lowp/reference/square_sums.py
RUNS = 16  # at a time: a warp's threads each read 8 elements of every 16


@triton.jit
def lane_sums(x):
    """[R] of [R, 16]: lane i + 8 to lane i, i + 4 to i, i + 2 to i, 1 to 0."""
    for half in tl.static_range(4):
        x = tl.sum(tl.reshape(x, [x.shape[0], 2, 8 >> half]), axis=1)  # of two, so of one order
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def _blocks(entry, first, last, partial, T: tl.constexpr, R: tl.constexpr,
            ALIGNED_ROW: tl.constexpr):
    """The runs among the blocks ``first`` to ``last`` of one tensor."""
    x = pointer(entry, 0, T, ALIGNED_ROW)
    width = tl.load(entry + WIDTH)
    if ALIGNED_ROW:
        width = width // 16 * 16
    end = tl.minimum(last * 256, width)
    lane = tl.arange(0, LANES)
    for i in range(first * 256, last * 256, R * RUN):
        start = i + tl.arange(0, R).to(tl.int64) * RUN
        at = start[:, None] + lane[None, :]
        lanes = tl.zeros([R, LANES], tl.float64)
        for _ in tl.range(RUN // LANES, loop_unroll_factor=4):
            mask = at < end
            value = widen(tl.load(x + at, mask=mask, other=0)).to(tl.float64)
            lanes += value * value  # +0 beyond the end, which changes no sum
            at += LANES
        tl.store(partial + (tl.load(entry + OFFSET) + start) // RUN, lane_sums(lanes),
                 mask=start < end)


@triton.jit(do_not_specialize=["chunk_blocks"])
def _runs(table, chunks, partial, chunk_blocks: tl.int64, T: tl.constexpr, R: tl.constexpr):
    """The runs of one chunk of one tensor a program."""
    entry, _, first = chunk_of(table, chunks, chunk_blocks)
    if tl.load(entry + ALIGNED) == 1:
        _blocks(entry, first, first + chunk_blocks, partial, T, R, True)
    else:
        _blocks(entry, first, first + chunk_blocks, partial, T, R, False)


@triton.jit
def run_sum(partial, first, numel):
    """The sum of a tensor's runs, one after the other."""
    total = tl.full([], 0.0, tl.float64)
    at = partial + first
    for _ in tl.range(0, (numel + RUN - 1) // RUN, loop_unroll_factor=8):
        total += tl.load(at)
        at += 1
    return total


@triton.jit
def _totals(table, partial, sums, ROW: tl.constexpr):
    """One tensor a program."""
    entry = table + tl.program_id(0).to(tl.int64) * ROW
    total = run_sum(partial, tl.load(entry + OFFSET) // RUN, tl.load(entry + WIDTH))
    tl.store(sums + tl.load(entry + TENSOR), total)


def square_sums(xs: Sequence[Tensor]) -> Tensor:
    """The op :data:`lowp.ops.square_sums.square_sums`."""
    work = [x.detach().contiguous() for x in xs]
    device = work[0].device if work else torch.device("cpu")
    sums = torch.empty(len(work), dtype=torch.float64, device=device)
    # where each tensor begins when all of them are in whole runs, one behind the other
    runs = [triton.cdiv(x.numel(), RUN.value) for x in work]
    first = [RUN.value * n for n in itertools.accumulate(runs, initial=0)]
    partial = sums.new_empty(sum(runs))
    members = members_of((work,), work, range(len(work)), first[:-1], None)
    for batch, (_, dtype) in batches(members):
        launch(_runs, (len(batch.chunks) // 2,), batch.table, batch.chunks, partial,
               batch.chunk_blocks, T=dtype, R=RUNS, num_warps=1, **EXACT)
        launch(_totals, (len(batch.table),), batch.table, partial, sums, ROW=batch.table.shape[1],
               num_warps=1, **EXACT)
    return sums
