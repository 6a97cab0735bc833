"""accumulate on GPUs: one pass over all totals of the same types."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import canonical_nan, widen
from lowp.kernels.update import (
    ALIGNED,
    BLOCKS_AT_ONCE,
    batches,
    chunk_of,
    members_of,
    noise_of,
    pointer,
    span,
    store_float,
)
from torch import Tensor

from lowp.ops import update


@triton.jit
def _blocks(entry, noise, first, last, T: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
            STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """The sums of the blocks ``first`` to ``last`` of one tensor."""
    total, grad = pointer(entry, 0, T, ALIGNED_ROW), pointer(entry, 1, G, ALIGNED_ROW)
    for i in range(first, last, R):
        _, start, at, mask = span(entry, i, R, ALIGNED_ROW, False)
        x = widen(tl.load(total + at, mask=mask, other=0))
        x = canonical_nan(x + widen(tl.load(grad + at, mask=mask, other=0)))
        store_float(x, total, at, mask, start, noise, 8, STOCHASTIC, ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _accumulate(table, chunks, steps, chunk_blocks: tl.int64, seed_low: tl.int64,
                seed_high: tl.int64, T: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
                STOCHASTIC: tl.constexpr):
    """One chunk of one tensor a program."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    noise = noise_of(entry, tl.load(steps + index), seed_low, seed_high)
    if tl.load(entry + ALIGNED) == 1:
        _blocks(entry, noise, first, first + chunk_blocks, T, G, R, STOCHASTIC, True)
    else:  # one draw an element: a quarter of the elements needs as many registers
        _blocks(entry, noise, first, first + chunk_blocks, T, G, R // 4, STOCHASTIC, False)


def accumulate(totals: Sequence[Tensor], grads: Sequence[Tensor], rounding: str, seed: int,
               step: Tensor, addition: int, tensors: Sequence[int],
               offsets: Sequence[int]) -> None:
    """The op :data:`lowp.ops.accumulate.accumulate`."""
    grads = [g.contiguous() for g in grads]
    bits = update.seed_of(seed, addition)
    with update.contiguous_params(totals) as work:
        members = members_of((work, grads), [step] * len(work), tensors, offsets, None)
        for batch, (_, t, g) in batches(members):
            # on the device: in a CUDA graph every replay reads the step of its own
            if step.device == batch.now.device:
                batch.now.copy_(step)
            else:
                batch.now.fill_(int(step))
            launch(_accumulate, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.now,
                   batch.chunk_blocks, bits & 0xFFFFFFFF, bits >> 32, T=t, G=g, R=BLOCKS_AT_ONCE,
                   STOCHASTIC=rounding == "stochastic", num_warps=4, **EXACT)
