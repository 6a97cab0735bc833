"""adamw on GPUs: one pass over all tensors of the same types."""

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
    store_float,
    store_state,
    store_weight,
)
from torch import Tensor

from lowp.ops import update


@triton.jit
def _blocks(entry, scalars, noise, first, last, one_minus_beta1, one_minus_beta2, eps, weight_decay,
            P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
            LARGEST: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, COUPLED: tl.constexpr,
            STOCHASTIC: tl.constexpr, STATE_STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """The update of the blocks ``first`` to ``last`` of one tensor."""
    param, grad = pointer(entry, 0, P, ALIGNED_ROW), pointer(entry, 1, G, ALIGNED_ROW)
    exp_avg, exp_avg_sq = pointer(entry, 2, M, ALIGNED_ROW), pointer(entry, 3, V, ALIGNED_ROW)
    m_scales, v_scales = pointer(entry, 4, tl.float32, False), pointer(entry, 5, tl.float32, False)
    step_size, inv_sqrt_bc2 = tl.load(scalars), tl.load(scalars + 1)
    decay, unscale = tl.load(scalars + 2), tl.load(scalars + 3)
    CODES: tl.constexpr = tl.int8 == M or tl.uint8 == V
    for i in range(first, last, R):
        block, start, at, mask = span(entry, i, R, ALIGNED_ROW, CODES)
        g = widen(tl.load(grad + at, mask=mask, other=0)) * unscale
        if COUPLED:
            g = g + load_weight(entry, param, at, mask, REST, ALIGNED_ROW) * weight_decay
        m = load_state(exp_avg, m_scales, block, at, mask)
        v = load_state(exp_avg_sq, v_scales, block, at, mask)
        if tl.uint8 == V:
            v = v * v
        m = canonical_nan(m + (g - m) * one_minus_beta1)
        v = canonical_nan(v + (g * g - v) * one_minus_beta2)
        used = v
        if LARGEST is not None:
            largest = pointer(entry, 6, LARGEST, ALIGNED_ROW)
            before = widen(tl.load(largest + at, mask=mask, other=0))
            used = tl.where((before > v) | (before != before), before, v)
            store_float(used, largest, at, mask, start, noise, 3, STATE_STOCHASTIC, ALIGNED_ROW)
        denominator = tl.sqrt_rn(used) * inv_sqrt_bc2 + eps
        p = load_weight(entry, param, at, mask, REST, ALIGNED_ROW)
        if not COUPLED:
            p = p * decay
        p = canonical_nan(p - tl.div_rn(m, denominator) * step_size)
        store_weight(p, entry, param, at, mask, start, noise, REST, STOCHASTIC, ALIGNED_ROW)
        store_state(m, exp_avg, m_scales, block, at, mask, start, noise, 1, STATE_STOCHASTIC,
                    ALIGNED_ROW)
        if tl.uint8 == V:
            v = tl.sqrt_rn(v)
        store_state(v, exp_avg_sq, v_scales, block, at, mask, start, noise, 2, STATE_STOCHASTIC,
                    ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _adamw(table, chunks, scalars, steps, chunk_blocks: tl.int64, one_minus_beta1: tl.float32,
           one_minus_beta2: tl.float32, eps: tl.float32, weight_decay: tl.float32,
           seed_low: tl.int64, seed_high: tl.int64, P: tl.constexpr, G: tl.constexpr,
           M: tl.constexpr, V: tl.constexpr, LARGEST: tl.constexpr, REST: tl.constexpr,
           R: tl.constexpr, COUPLED: tl.constexpr, STOCHASTIC: tl.constexpr,
           STATE_STOCHASTIC: tl.constexpr):
    """One chunk of one tensor a program; a tensor whose step is 0 is skipped."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    scalars, now = scalars + index * 4, tl.load(steps + index)
    noise = noise_of(entry, now, seed_low, seed_high)
    if now > 0:
        if tl.load(entry + ALIGNED) == 1:
            _blocks(entry, scalars, noise, first, first + chunk_blocks, one_minus_beta1,
                    one_minus_beta2, eps, weight_decay, P, G, M, V, LARGEST, REST, R, COUPLED,
                    STOCHASTIC, STATE_STOCHASTIC, True)
        else:  # one draw an element: a quarter of the elements needs as many registers
            _blocks(entry, scalars, noise, first, first + chunk_blocks, one_minus_beta1,
                    one_minus_beta2, eps, weight_decay, P, G, M, V, LARGEST, REST, R // 4, COUPLED,
                    STOCHASTIC, STATE_STOCHASTIC, False)


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
          exp_avg_sqs: Sequence[Tensor], exp_avg_scales: Sequence[Tensor],
          exp_avg_sq_scales: Sequence[Tensor], max_exp_avg_sqs: Sequence[Tensor],
          steps: Sequence[Tensor], lr: Tensor, beta1: float, beta2: float, weight_decay: float,
          eps: float, maximize: bool, rounding: str, state_rounding: str, seed: int,
          tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
          found_inf: Tensor | None, coupled: bool = False,
          masters: Sequence[Tensor] | None = None) -> None:
    """The op :data:`lowp.ops.adamw.adamw`."""
    grads = [g.contiguous() for g in grads]
    bits = seed & (2**64 - 1)
    with update.contiguous_params(params) as work, \
            update.contiguous_params(max_exp_avg_sqs) as maxima:
        lists = (work, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, maxima)
        members = members_of(lists, steps, tensors, offsets, masters)
        for batch, on_device, (rest, p, g, m, v, _, _, *largest) in counted(members, found_inf):
            advance(batch, on_device, lr, beta1, beta2, weight_decay, maximize, grad_scale,
                    found_inf)
            launch(_adamw, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, batch.chunk_blocks, 1 - beta1, 1 - beta2, eps, weight_decay,
                   bits & 0xFFFFFFFF, bits >> 32, P=p, G=g, M=m, V=v,
                   LARGEST=largest[0] if largest else None, REST=rest, R=BLOCKS_AT_ONCE,
                   COUPLED=coupled and weight_decay != 0, STOCHASTIC=rounding == "stochastic",
                   STATE_STOCHASTIC=state_rounding == "stochastic", num_warps=4, **EXACT)
