"""sgd on GPUs: one pass over all tensors of the same types."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import canonical_nan, widen
from lowp.kernels.update import (
    ALIGNED,
    BLOCKS_AT_ONCE,
    OFFSET,
    ROW,
    TENSOR,
    TYPES,
    Member,
    advance,
    batches,
    load_state,
    pointer,
    require_no_masters,
    span,
    store_float,
    store_state,
)
from torch import Tensor

from lowp.ops import update


@triton.jit
def _blocks(entry, scalars, now, first, last, momentum, one_minus_dampening, weight_decay, seed_low,
            seed_high, P: tl.constexpr, G: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
            DECAY: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
            STATE_STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """The update of the blocks ``first`` to ``last`` of one tensor."""
    param, grad = pointer(entry, 0, P, ALIGNED_ROW), pointer(entry, 1, G, ALIGNED_ROW)
    tensor, offset = tl.load(entry + TENSOR), tl.load(entry + OFFSET)
    lr, unscale = tl.load(scalars), tl.load(scalars + 3)
    for i in range(first, last, R):
        block, start, at, mask = span(entry, i, R, ALIGNED_ROW, tl.int8 == B)
        p = widen(tl.load(param + at, mask=mask, other=0))
        d = widen(tl.load(grad + at, mask=mask, other=0)) * unscale
        if DECAY:
            d = d + p * weight_decay
        if B is not None:
            buffer, scales = pointer(entry, 2, B, ALIGNED_ROW), pointer(entry, 3, tl.float32, False)
            old = load_state(buffer, scales, block, at, mask)
            b = tl.where(now == 1, d, old * momentum + d * one_minus_dampening)
            b = canonical_nan(b)
            store_state(b, buffer, scales, block, at, mask, start, offset, seed_low, seed_high, now,
                        tensor, 1, STATE_STOCHASTIC, ALIGNED_ROW)
            d = d + b * momentum if NESTEROV else b
        store_float(canonical_nan(p - d * lr), param, at, mask, start, offset, seed_low, seed_high,
                    now, tensor, 0, STOCHASTIC, ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _sgd(table, chunks, scalars, steps, chunk_blocks: tl.int64, momentum: tl.float32,
         one_minus_dampening: tl.float32, weight_decay: tl.float32, seed_low: tl.int64,
         seed_high: tl.int64, P: tl.constexpr, G: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
         DECAY: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
         STATE_STOCHASTIC: tl.constexpr):
    """One chunk of one tensor a program; a tensor whose step is 0 is skipped."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(chunk).to(tl.int64)
    first = tl.load(chunk + 1).to(tl.int64) * chunk_blocks
    entry = table + index * ROW
    now = tl.load(steps + index)
    if now > 0:
        if tl.load(entry + ALIGNED) == 1:
            _blocks(entry, scalars + index * 4, now, first, first + chunk_blocks, momentum,
                    one_minus_dampening, weight_decay, seed_low, seed_high, P, G, B, R, DECAY,
                    NESTEROV, STOCHASTIC, STATE_STOCHASTIC, True)
        else:  # one draw an element: a quarter of the elements needs as many registers
            _blocks(entry, scalars + index * 4, now, first, first + chunk_blocks, momentum,
                    one_minus_dampening, weight_decay, seed_low, seed_high, P, G, B, R // 4, DECAY,
                    NESTEROV, STOCHASTIC, STATE_STOCHASTIC, False)


def sgd(params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor],
        momentum_scales: Sequence[Tensor], steps: Sequence[Tensor], lr: Tensor, momentum: float,
        dampening: float, weight_decay: float, nesterov: bool, maximize: bool, rounding: str,
        state_rounding: str, seed: int, tensors: Sequence[int], offsets: Sequence[int],
        grad_scale: Tensor | None, found_inf: Tensor | None,
        masters: Sequence[Tensor] | None = None) -> None:
    """The op :data:`lowp.ops.sgd.sgd`, without masters."""
    require_no_masters("sgd", masters)
    grads = [g.contiguous() for g in grads]
    bits = seed & (2**64 - 1)
    with update.contiguous_params(params) as work:
        lists = (work, grads, momentum_buffers, momentum_scales)
        members = [Member(parts, steps[i], tensors[i], offsets[i])
                   for i, parts in enumerate(zip(*(t for t in lists if t), strict=True))]
        for batch, on_device, types in batches(members, found_inf):
            # the scalars with beta 0 are lr and the unscaling
            advance(batch, on_device, lr, 0.0, 0.0, 0.0, maximize, grad_scale, found_inf)
            p, g, *buffer = (TYPES[t] for t in types)
            launch(_sgd, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, batch.chunk_blocks, momentum, 1 - dampening, weight_decay,
                   bits & 0xFFFFFFFF, bits >> 32, P=p, G=g, B=buffer[0] if buffer else None,
                   R=BLOCKS_AT_ONCE, DECAY=weight_decay != 0, NESTEROV=nesterov,
                   STOCHASTIC=rounding == "stochastic",
                   STATE_STOCHASTIC=state_rounding == "stochastic", num_warps=4, **EXACT)
