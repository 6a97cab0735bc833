"""bias_grad on GPUs: sums of 64 rows side by side, then of these sums, in the contract's order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import widen
from torch import Tensor

GROUPS, COLS = 4, 256  # groups of 64 rows, columns: a warp reads 512 bytes of a bf16 row


@triton.jit(do_not_specialize=["rows"])
def _groups(dy, partial, rows: tl.int64, cols: tl.int64, G: tl.constexpr, C: tl.constexpr):
    """partial [ceil(rows / 64), cols]: groups of 64 rows, one row after the other.

    A row beyond the last adds +0, which changes no sum, for none is -0.
    """
    group = tl.program_id(1).to(tl.int64) * G + tl.arange(0, G)
    col = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros([G, C], tl.float32)
    row = group * 64
    for _ in tl.range(64, loop_unroll_factor=8):
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        total += widen(tl.load(dy + row[:, None] * cols + col[None, :], mask=mask, other=0.0))
        row += 1
    mask = (group * 64 < rows)[:, None] & (col < cols)[None, :]
    tl.store(partial + group[:, None] * cols + col[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["groups"])
def _total(partial, db, groups: tl.int64, cols: tl.int64, C: tl.constexpr):
    """The sums of the groups, one after the other."""
    col = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    at = col
    for _ in tl.range(groups, num_stages=4):
        total += tl.load(partial + at, mask=col < cols, other=0.0)
        at += cols
    tl.store(db + col, total, mask=col < cols)


def bias_grad(dy: Tensor) -> Tensor:
    """The op :data:`lowp.ops.bias_grad.bias_grad`."""
    dy = dy.contiguous()
    rows, cols = dy.shape
    groups = triton.cdiv(rows, 64)
    partial = dy.new_empty((groups, cols), dtype=torch.float32)
    db = dy.new_empty(cols, dtype=partial.dtype)
    across = triton.cdiv(cols, COLS)
    launch(_groups, (across, triton.cdiv(groups, GROUPS)), dy, partial, rows, cols, G=GROUPS,
           C=COLS, num_warps=4, **EXACT)
    launch(_total, (across,), partial, db, groups, cols, C=COLS, num_warps=2, **EXACT)
    return db
