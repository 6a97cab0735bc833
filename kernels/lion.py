"""lion on GPUs: one pass over all tensors of the same types."""

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
def _blocks(entry, scalars, noise, first, last, beta1, one_minus_beta1, beta2, one_minus_beta2,
            P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, REST: tl.constexpr, R: tl.constexpr,
            STOCHASTIC: tl.constexpr, STATE_STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """The update of the blocks ``first`` to ``last`` of one tensor."""
    param, grad = pointer(entry, 0, P, ALIGNED_ROW), pointer(entry, 1, G, ALIGNED_ROW)
    exp_avg, scales = pointer(entry, 2, M, ALIGNED_ROW), pointer(entry, 3, tl.float32, False)
    lr, decay, unscale = tl.load(scalars), tl.load(scalars + 2), tl.load(scalars + 3)
    for i in range(first, last, R):
        block, start, at, mask = span(entry, i, R, ALIGNED_ROW, tl.int8 == M)
        g = widen(tl.load(grad + at, mask=mask, other=0)) * unscale
        m = load_state(exp_avg, scales, block, at, mask)
        mean = m * beta1 + g * one_minus_beta1
        step = tl.where(mean > 0.0, lr, tl.where(mean < 0.0, -lr, 0.0))
        step = tl.where(mean != mean, mean, step)
        p = load_weight(entry, param, at, mask, REST, ALIGNED_ROW)
        store_weight(canonical_nan(p * decay - step), entry, param, at, mask, start, noise, REST,
                     STOCHASTIC, ALIGNED_ROW)
        m = canonical_nan(m * beta2 + g * one_minus_beta2)
        store_state(m, exp_avg, scales, block, at, mask, start, noise, 1, STATE_STOCHASTIC,
                    ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _lion(table, chunks, scalars, steps, chunk_blocks: tl.int64, beta1: tl.float32,
          one_minus_beta1: tl.float32, beta2: tl.float32, one_minus_beta2: tl.float32,
          seed_low: tl.int64, seed_high: tl.int64, P: tl.constexpr, G: tl.constexpr,
          M: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, STOCHASTIC: tl.constexpr,
          STATE_STOCHASTIC: tl.constexpr):
    """One chunk of one tensor a program; a tensor whose step is 0 is skipped."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    scalars, now = scalars + index * 4, tl.load(steps + index)
    noise = noise_of(entry, now, seed_low, seed_high)
    if now > 0:
        if tl.load(entry + ALIGNED) == 1:
            _blocks(entry, scalars, noise, first, first + chunk_blocks, beta1, one_minus_beta1,
                    beta2, one_minus_beta2, P, G, M, REST, R, STOCHASTIC, STATE_STOCHASTIC, True)
        else:  # one draw an element: a quarter of the elements needs as many registers
            _blocks(entry, scalars, noise, first, first + chunk_blocks, beta1, one_minus_beta1,
                    beta2, one_minus_beta2, P, G, M, REST, R // 4, STOCHASTIC, STATE_STOCHASTIC,
                    False)


def lion(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
         exp_avg_scales: Sequence[Tensor], steps: Sequence[Tensor], lr: Tensor, beta1: float,
         beta2: float, weight_decay: float, maximize: bool, rounding: str, state_rounding: str,
         seed: int, tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
         found_inf: Tensor | None, masters: Sequence[Tensor] | None = None) -> None:
    """The op :data:`lowp.ops.lion.lion`."""
    grads = [g.contiguous() for g in grads]
    bits = seed & (2**64 - 1)
    with update.contiguous_params(params) as work:
        lists = (work, grads, exp_avgs, exp_avg_scales)
        members = members_of(lists, steps, tensors, offsets, masters)
        for batch, on_device, (rest, p, g, m, _) in counted(members, found_inf):
            # the scalars with beta 0 are lr, the decay and the unscaling
            advance(batch, on_device, lr, 0.0, 0.0, weight_decay, maximize, grad_scale, found_inf)
            launch(_lion, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, batch.chunk_blocks, beta1, 1 - beta1, beta2, 1 - beta2,
                   bits & 0xFFFFFFFF, bits >> 32, P=p, G=g, M=m, REST=rest, R=BLOCKS_AT_ONCE,
                   STOCHASTIC=rounding == "stochastic",
                   STATE_STOCHASTIC=state_rounding == "stochastic", num_warps=4, **EXACT)
