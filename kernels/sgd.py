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
    advance,
    chunk_of,
    counted,
    load_state,
    load_weight,
    members_of,
    noise_of,
    pointer,
    span,
    store_state,
    store_weight,
)
from torch import Tensor

from lowp.ops import update


@triton.jit
def _blocks(entry, scalars, noise, first, last, momentum, one_minus_dampening, weight_decay,
            P: tl.constexpr, G: tl.constexpr, B: tl.constexpr, REST: tl.constexpr, R: tl.constexpr,
            DECAY: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
            STATE_STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """The update of the blocks ``first`` to ``last`` of one tensor."""
    param, grad = pointer(entry, 0, P, ALIGNED_ROW), pointer(entry, 1, G, ALIGNED_ROW)
    lr, unscale = tl.load(scalars), tl.load(scalars + 3)
    for i in range(first, last, R):
        block, start, at, mask = span(entry, i, R, ALIGNED_ROW, tl.int8 == B)
        p = load_weight(entry, param, at, mask, REST, ALIGNED_ROW)
        d = widen(tl.load(grad + at, mask=mask, other=0)) * unscale
        if DECAY:
            d = d + p * weight_decay
        if B is not None:
            buffer, scales = pointer(entry, 2, B, ALIGNED_ROW), pointer(entry, 3, tl.float32, False)
            old = load_state(buffer, scales, block, at, mask)
            b = tl.where(noise[2] == 1, d, old * momentum + d * one_minus_dampening)
            b = canonical_nan(b)
            store_state(b, buffer, scales, block, at, mask, start, noise, 1, STATE_STOCHASTIC,
                        ALIGNED_ROW)
            d = d + b * momentum if NESTEROV else b
        store_weight(canonical_nan(p - d * lr), entry, param, at, mask, start, noise, REST,
                     STOCHASTIC, ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _sgd(table, chunks, scalars, steps, chunk_blocks: tl.int64, momentum: tl.float32,
         one_minus_dampening: tl.float32, weight_decay: tl.float32, seed_low: tl.int64,
         seed_high: tl.int64, P: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
         REST: tl.constexpr, R: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr,
         STOCHASTIC: tl.constexpr, STATE_STOCHASTIC: tl.constexpr):
    """One chunk of one tensor a program; a tensor whose step is 0 is skipped."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    scalars, now = scalars + index * 4, tl.load(steps + index)
    noise = noise_of(entry, now, seed_low, seed_high)
    if now > 0:
        if tl.load(entry + ALIGNED) == 1:
            _blocks(entry, scalars, noise, first, first + chunk_blocks, momentum,
                    one_minus_dampening, weight_decay, P, G, B, REST, R, DECAY, NESTEROV,
                    STOCHASTIC, STATE_STOCHASTIC, True)
        else:  # one draw an element: a quarter of the elements needs as many registers
            _blocks(entry, scalars, noise, first, first + chunk_blocks, momentum,
                    one_minus_dampening, weight_decay, P, G, B, REST, R // 4, DECAY, NESTEROV,
                    STOCHASTIC, STATE_STOCHASTIC, False)


def sgd(params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor],
        momentum_scales: Sequence[Tensor], steps: Sequence[Tensor], lr: Tensor, momentum: float,
        dampening: float, weight_decay: float, nesterov: bool, maximize: bool, rounding: str,
        state_rounding: str, seed: int, tensors: Sequence[int], offsets: Sequence[int],
        grad_scale: Tensor | None, found_inf: Tensor | None,
        masters: Sequence[Tensor] | None = None) -> None:
    """The op :data:`lowp.ops.sgd.sgd`."""
    grads = [g.contiguous() for g in grads]
    bits = seed & (2**64 - 1)
    with update.contiguous_params(params) as work:
        lists = (work, grads, momentum_buffers, momentum_scales)
        members = members_of(lists, steps, tensors, offsets, masters)
        for batch, on_device, (rest, p, g, *buffer) in counted(members, found_inf):
            # the scalars with beta 0 are lr and the unscaling
            advance(batch, on_device, lr, 0.0, 0.0, 0.0, maximize, grad_scale, found_inf)
            launch(_sgd, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, batch.chunk_blocks, momentum, 1 - dampening, weight_decay,
                   bits & 0xFFFFFFFF, bits >> 32, P=p, G=g, B=buffer[0] if buffer else None,
                   REST=rest, R=BLOCKS_AT_ONCE, DECAY=weight_decay != 0, NESTEROV=nesterov,
                   STOCHASTIC=rounding == "stochastic",
                   STATE_STOCHASTIC=state_rounding == "stochastic", num_warps=4, **EXACT)
