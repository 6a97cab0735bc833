"""muon on GPUs: momentum and step, each one pass over all matrices of the same types."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import canonical_nan, widen
from lowp.kernels.update import (
    ALIGNED,
    BLOCKS_AT_ONCE,
    EXTRA,
    advance,
    batches,
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
from lowp.ops.muon import orthogonalize, rate_factors


@triton.jit
def _means_of(entry, scalars, noise, first, last, momentum, one_minus_momentum, G: tl.constexpr,
              B: tl.constexpr, R: tl.constexpr, NESTEROV: tl.constexpr,
              STATE_STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """The momentum of the blocks ``first`` to ``last`` of one matrix."""
    x, grad = pointer(entry, 0, tl.float32, ALIGNED_ROW), pointer(entry, 1, G, ALIGNED_ROW)
    buffer, scales = pointer(entry, 2, B, ALIGNED_ROW), pointer(entry, 3, tl.float32, False)
    unscale = tl.load(scalars + 3)
    for i in range(first, last, R):
        block, start, at, mask = span(entry, i, R, ALIGNED_ROW, tl.int8 == B)
        g = widen(tl.load(grad + at, mask=mask, other=0)) * unscale
        mean = load_state(buffer, scales, block, at, mask)
        mean = canonical_nan(mean + (g - mean) * one_minus_momentum)
        ahead = canonical_nan(g + (mean - g) * momentum) if NESTEROV else mean
        tl.store(x + at, ahead, mask=mask)
        store_state(mean, buffer, scales, block, at, mask, start, noise, 1, STATE_STOCHASTIC,
                    ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _momentum(table, chunks, scalars, steps, chunk_blocks: tl.int64, momentum: tl.float32,
              one_minus_momentum: tl.float32, seed_low: tl.int64, seed_high: tl.int64,
              G: tl.constexpr, B: tl.constexpr, R: tl.constexpr, NESTEROV: tl.constexpr,
              STATE_STOCHASTIC: tl.constexpr):
    """One chunk of one matrix a program; a matrix whose step is 0 is skipped."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    scalars, now = scalars + index * 4, tl.load(steps + index)
    noise = noise_of(entry, now, seed_low, seed_high)
    if now > 0:
        if tl.load(entry + ALIGNED) == 1:
            _means_of(entry, scalars, noise, first, first + chunk_blocks, momentum,
                      one_minus_momentum, G, B, R, NESTEROV, STATE_STOCHASTIC, True)
        else:  # one draw an element: a quarter of the elements needs as many registers
            _means_of(entry, scalars, noise, first, first + chunk_blocks, momentum,
                      one_minus_momentum, G, B, R // 4, NESTEROV, STATE_STOCHASTIC, False)


@triton.jit
def _move_of(entry, decay, rate, noise, first, last, P: tl.constexpr, D: tl.constexpr,
             REST: tl.constexpr, R: tl.constexpr, STOCHASTIC: tl.constexpr,
             ALIGNED_ROW: tl.constexpr):
    """The step of the blocks ``first`` to ``last`` of one matrix."""
    param, direction = pointer(entry, 0, P, ALIGNED_ROW), pointer(entry, 1, D, ALIGNED_ROW)
    for i in range(first, last, R):
        _, start, at, mask = span(entry, i, R, ALIGNED_ROW, False)
        p = load_weight(entry, param, at, mask, REST, ALIGNED_ROW)
        d = widen(tl.load(direction + at, mask=mask, other=0))
        store_weight(canonical_nan(p * decay - d * rate), entry, param, at, mask, start, noise,
                     REST, STOCHASTIC, ALIGNED_ROW)


@triton.jit(do_not_specialize=["chunk_blocks", "seed_low", "seed_high"])
def _step(table, chunks, scalars, steps, lr_pointer, chunk_blocks: tl.int64, lr: tl.float64,
          seed_low: tl.int64, seed_high: tl.int64, P: tl.constexpr, D: tl.constexpr,
          REST: tl.constexpr, R: tl.constexpr, STOCHASTIC: tl.constexpr):
    """As :func:`_momentum`."""
    entry, index, first = chunk_of(table, chunks, chunk_blocks)
    decay, now = tl.load(scalars + index * 4 + 2), tl.load(steps + index)
    noise = noise_of(entry, now, seed_low, seed_high)
    rate = lr + tl.full([], 0.0, tl.float64)
    if lr_pointer is not None:
        rate = tl.load(lr_pointer).to(tl.float64)
    for i in tl.static_range(2):
        rate = rate * tl.load(entry + EXTRA + i).to(tl.float64, bitcast=True)
    if now > 0:
        if tl.load(entry + ALIGNED) == 1:
            _move_of(entry, decay, rate.to(tl.float32), noise, first, first + chunk_blocks, P, D,
                     REST, R, STOCHASTIC, True)
        else:
            _move_of(entry, decay, rate.to(tl.float32), noise, first, first + chunk_blocks, P, D,
                     REST, R // 4, STOCHASTIC, False)


def muon(params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor],
         momentum_scales: Sequence[Tensor], steps: Sequence[Tensor], lr: Tensor, momentum: float,
         nesterov: bool, ns_coefficients: Sequence[float], eps: float, ns_steps: int,
         weight_decay: float, adjust_lr: str, maximize: bool, rounding: str, state_rounding: str,
         seed: int, tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
         found_inf: Tensor | None, masters: Sequence[Tensor] | None = None) -> None:
    """The op :data:`lowp.ops.muon.muon`."""
    grads = [g.contiguous() for g in grads]
    low, high = seed & 0xFFFFFFFF, (seed & (2**64 - 1)) >> 32
    xs = [torch.empty(p.shape, device=p.device) for p in params]
    members = members_of((xs, grads, momentum_buffers, momentum_scales), steps, tensors, offsets,
                         None)
    on_device = None
    for batch, on_device, (_, _, g, b, _) in counted(members, found_inf):
        advance(batch, on_device, lr, 0.0, 0.0, weight_decay, maximize, grad_scale, found_inf)
        launch(_momentum, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
               batch.now, batch.chunk_blocks, momentum, 1 - momentum, low, high, G=g, B=b,
               R=BLOCKS_AT_ONCE, NESTEROV=nesterov,
               STATE_STOCHASTIC=state_rounding == "stochastic", num_warps=4, **EXACT)
    if on_device is None:
        return
    del members  # with it the means, each as it is made orthogonal
    orthogonalize(xs, ns_coefficients, eps, ns_steps)
    counts = None if on_device else [int(s) for s in steps]
    factors = [struct.unpack("<2q", struct.pack("<2d", *rate_factors(p, adjust_lr)))
               for p in params]
    with update.contiguous_params(params) as work:
        members = members_of((work, xs), steps, tensors, offsets, masters, factors)
        for batch, (rest, p, d) in batches(members, counts):
            advance(batch, False, lr, 0.0, 0.0, weight_decay, False, None, found_inf)
            here = lr.device == batch.table.device
            launch(_step, (len(batch.chunks) // 2,), batch.table, batch.chunks, batch.scalars,
                   batch.now, lr if here else None, batch.chunk_blocks, 0.0 if here else lr.item(),
                   low, high, P=p, D=d, REST=rest, R=BLOCKS_AT_ONCE,
                   STOCHASTIC=rounding == "stochastic", num_warps=4, **EXACT)
