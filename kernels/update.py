"""What the optimizer kernels share: a table of all tensors on the device, its chunks, the scalars.

One launch updates all tensors of the same types. What changes from step to step (steps, lr, what a
gradient scaler says) is read on the device, so that a CUDA graph replays with its current values.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lowp.kernels import launch as launches
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import (
    INF_BITS,
    STATE_BLOCK,
    bits_float,
    canonical_nan,
    decode_state,
    draws,
    encode_state,
    float_bits,
    magnitude_bits,
    state_scale,
    to_nearest,
    to_stochastic,
    widen,
)
from torch import Tensor

from lowp.key import is_capturing
from lowp.ops import update
from lowp.reference.codec import BLOCK

ROW = tl.constexpr(20)  # int64 entries of a tensor in the table
POINTERS = 7  # the first entries: param, grad, states, scales
WIDTH, BLOCKS, PER_ROW, TENSOR, OFFSET, ALIGNED, STEP, REST, EXTRA = (
    tl.constexpr(i) for i in range(7, 16))
BLOCKS_AT_ONCE = 16 if launches.INTERPRETED else 4
"""Blocks of 256 that a program updates at a time: 8 elements a thread of 4 warps. The interpreter
is slow by operations, not by elements."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
         torch.int8: tl.int8, torch.uint8: tl.uint8, torch.int16: tl.int16}


@triton.jit
def pointer(entry, index: tl.constexpr, dtype: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """A tensor's address in its table entry."""
    address = tl.load(entry + index).to(tl.pointer_type(dtype))
    if ALIGNED_ROW:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def chunk_of(table, chunks, chunk_blocks):
    """The chunk of one tensor that a program takes: table entry, index and first block."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(chunk).to(tl.int64)
    return table + index * ROW, index, tl.load(chunk + 1).to(tl.int64) * chunk_blocks


@triton.jit
def noise_of(entry, now, seed_low, seed_high):
    """What a tensor draws, of which only the role changes."""
    return seed_low, seed_high, now, tl.load(entry + TENSOR), tl.load(entry + OFFSET)


@triton.jit
def span(entry, first, R: tl.constexpr, ALIGNED_ROW: tl.constexpr, CODES: tl.constexpr):
    """R blocks of a tensor from ``first`` on: numbers, first elements, elements, which exist."""
    width = tl.load(entry + WIDTH)
    if ALIGNED_ROW:
        width = width // 16 * 16
    block = first + tl.arange(0, R)
    if CODES:
        per_row = tl.load(entry + PER_ROW)
        before = block % per_row * STATE_BLOCK
        start = block // per_row * width + before
    else:
        before = block * STATE_BLOCK
        start = before
    lane = tl.arange(0, STATE_BLOCK)
    mask = (block < tl.load(entry + BLOCKS))[:, None] & (before[:, None] + lane[None, :] < width)
    return block, start, start[:, None] + lane[None, :], mask


@triton.jit
def load_state(state, scales, block, at, mask):
    """fp32 values of floats, or of codes with one scale a block."""
    x = tl.load(state + at, mask=mask, other=0)
    dtype: tl.constexpr = state.dtype.element_ty
    if dtype == tl.int8 or dtype == tl.uint8:
        scale = tl.load(scales + block, mask=tl.max(mask.to(tl.int32), axis=1) > 0, other=0.0)
        y = decode_state(x, scale[:, None], dtype == tl.int8)
    else:
        y = widen(x)
    return y


@triton.jit
def _drawn(start, x, noise, role: tl.constexpr, GROUPED: tl.constexpr):
    return draws(noise[4] + start, x.shape[1], GROUPED, noise[0], noise[1], noise[2], noise[3],
                 role)


@triton.jit
def store_float(x, target, at, mask, start, noise, role: tl.constexpr, STOCHASTIC: tl.constexpr,
                GROUPED: tl.constexpr):
    """Round ``x`` once into floats."""
    dtype: tl.constexpr = target.dtype.element_ty
    if STOCHASTIC and dtype != tl.float32:
        draw = _drawn(start, x, noise, role, GROUPED)
        tl.store(target + at, to_stochastic(x, draw, dtype), mask=mask)
    else:
        tl.store(target + at, to_nearest(x, dtype), mask=mask)


@triton.jit
def store_state(x, state, scales, block, at, mask, start, noise, role: tl.constexpr,
                STOCHASTIC: tl.constexpr, GROUPED: tl.constexpr):
    """Round ``x`` once into a state of floats, or code it."""
    dtype: tl.constexpr = state.dtype.element_ty
    if dtype == tl.int8 or dtype == tl.uint8:
        scale = state_scale(tl.max(tl.where(mask, magnitude_bits(x), 0), axis=1))
        draw = 0
        if STOCHASTIC:
            draw = _drawn(start, x, noise, role, GROUPED)
        wide = scale[:, None] + tl.zeros(x.shape, tl.float32)
        tl.store(state + at, encode_state(x, wide, draw, dtype == tl.int8, STOCHASTIC), mask=mask)
        tl.store(scales + block, scale, mask=tl.max(mask.to(tl.int32), axis=1) > 0)
    else:
        store_float(x, state, at, mask, start, noise, role, STOCHASTIC, GROUPED)


@triton.jit
def load_weight(entry, param, at, mask, REST_TYPE: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """A weight in fp32 with what its master adds (lowp.reference.stores.load_weight)."""
    x = widen(tl.load(param + at, mask=mask, other=0))
    if REST_TYPE is not None:
        rest = tl.load(pointer(entry, REST, REST_TYPE, ALIGNED_ROW) + at, mask=mask, other=0)
        if tl.int16 == REST_TYPE:
            x = bits_float(float_bits(x) + rest.to(tl.int32).to(tl.uint32, bitcast=True))
        else:
            x = x + widen(rest)
    return x


@triton.jit
def store_weight(x, entry, param, at, mask, start, noise, REST_TYPE: tl.constexpr,
                 STOCHASTIC: tl.constexpr, ALIGNED_ROW: tl.constexpr):
    """Round ``x`` into the weight and keep in its master what that loses."""
    if REST_TYPE is None:
        store_float(x, param, at, mask, start, noise, 0, STOCHASTIC, ALIGNED_ROW)
    else:
        master = pointer(entry, REST, REST_TYPE, ALIGNED_ROW)
        dtype: tl.constexpr = param.dtype.element_ty
        if tl.int16 == REST_TYPE:
            bits = float_bits(x)
            high = ((bits + 0x8000) >> 16).to(tl.uint16).to(dtype, bitcast=True)
            tl.store(param + at, high, mask=mask)
            tl.store(master + at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
        else:
            nearest = to_nearest(x, dtype)
            tl.store(param + at, nearest, mask=mask)
            kept = widen(nearest)
            lost = tl.where(magnitude_bits(kept) == INF_BITS, 0.0, canonical_nan(x - kept))
            store_float(lost, master, at, mask, start, noise, 0, STOCHASTIC, ALIGNED_ROW)


@triton.jit
def _power(base, n):
    """base^n for 0 <= n <= 2^24, by squaring, as lowp.reference.adamw.power."""
    result = tl.full(n.shape, 1.0, tl.float64)
    factor = tl.zeros(n.shape, tl.float64) + base
    for _ in tl.static_range(25):
        result = tl.where((n & 1) == 1, result * factor, result)
        factor = factor * factor
        n = n >> 1
    return result


@triton.jit(do_not_specialize=["tensors"])
def _advance(table, scalars, now, lr_pointer, grad_scale, found_inf, tensors: tl.int64,
             lr: tl.float64, beta1: tl.float64, beta2: tl.float64, weight_decay: tl.float64,
             ADVANCE: tl.constexpr, MAXIMIZE: tl.constexpr, LANES: tl.constexpr):
    """Count the step of every tensor, unless it is to be skipped (``now`` 0), and compute in fp64

    lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - lr weight_decay, +-1 / grad_scale, rounded once.
    """
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = i < tensors
    at = tl.load(table + i * ROW + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(at, mask=mask, other=1.0)
    skipped = tl.zeros([LANES], tl.int32)
    if found_inf is not None:
        skipped += (tl.load(found_inf).to(tl.float32) != 0.0).to(tl.int32)
    if ADVANCE:
        step = step + 1.0
        tl.store(at, step, mask=mask & (skipped == 0))
    t = step.to(tl.int32)
    rate = tl.zeros([LANES], tl.float64)
    if lr_pointer is None:
        rate += lr
    else:
        rate += tl.load(lr_pointer).to(tl.float64)
    unscale = tl.full([LANES], 1.0, tl.float64)
    if grad_scale is not None:
        unscale = unscale / tl.load(grad_scale).to(tl.float64)
    if MAXIMIZE:
        unscale = -unscale
    one = tl.full([LANES], 1.0, tl.float64)
    to = scalars + i * 4
    tl.store(to, (rate / (one - _power(beta1, t))).to(tl.float32), mask=mask)
    tl.store(to + 1, (one / tl.sqrt(one - _power(beta2, t))).to(tl.float32), mask=mask)
    tl.store(to + 2, (one - rate * weight_decay).to(tl.float32), mask=mask)
    tl.store(to + 3, unscale.to(tl.float32), mask=mask)
    tl.store(now + i, tl.where(skipped == 0, t, 0).to(tl.int64), mask=mask)


class Member(NamedTuple):
    """One tensor of an update: its param, grad, states and scales (empty where it has none)."""

    tensors: tuple[Tensor, ...]
    step: Tensor
    tensor: int
    offset: int
    master: Tensor | None  # None where the weight lacks nothing
    extra: tuple[int, ...]  # what an op adds to the table entry

    @property
    def types(self) -> tuple[torch.dtype | None, ...]:
        """What must be equal for tensors to share a launch."""
        return (None if self.master is None else self.master.dtype,
                *(t.dtype for t in self.tensors))


def members_of(lists: Iterable[Sequence[Tensor]], steps: Sequence[Tensor], tensors: Sequence[int],
               offsets: Sequence[int], masters: Sequence[Tensor] | None,
               extras: Sequence[tuple[int, ...]] | None = None) -> list[Member]:
    """The tensors of an update; a list that is empty is one of states that there are none of."""
    rests = [m if m.numel() else None for m in masters] if masters else [None] * len(steps)
    parts = zip(*(entries for entries in lists if entries), strict=True)
    entries = zip(parts, steps, tensors, offsets, rests, extras or [()] * len(steps), strict=True)
    return [Member(*entry) for entry in entries]


class Batch(NamedTuple):
    """Tensors of the same types, as a kernel finds them on the device."""

    table: Tensor  # [tensors, ROW] int64
    chunks: Tensor  # [chunks, 2] int32: tensor, number of the chunk in it
    chunk_blocks: int
    scalars: Tensor  # [tensors, 4] fp32: what _advance says
    now: Tensor  # [tensors] int64: the step, 0 to skip
    steps: Tensor  # [tensors] fp32: copies of steps that are kept on the host
    sources: tuple[Tensor, Tensor]  # what table and chunks are copied from


def _entry(member: Member, step: int) -> tuple[int, ...]:
    p = member.tensors[0]
    codes = any(t.dtype in (torch.int8, torch.uint8) for t in member.tensors)
    rows, width = update.rows_cols_of(p) if codes and p.numel() else (1, p.numel())
    per_row = -(-width // BLOCK)
    pointers = [t.data_ptr() if t.numel() else 0 for t in member.tensors]
    pointers += [0] * (POINTERS - len(pointers))
    rest = 0 if member.master is None else member.master.data_ptr()
    aligned = (width % 16 == 0 and member.offset % 8 == 0
               and all(address % 16 == 0 for address in (*pointers, rest)))
    return (*pointers, width, rows * per_row, per_row, member.tensor, member.offset, int(aligned),
            step, rest, *member.extra, *[0] * (ROW.value - EXTRA.value - len(member.extra)))


def _on_host(values: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is copied to the device. Pinned, unless a CUDA graph is captured: torch then asks for
    events, which a capture forbids, and the graph copies pageable memory as well."""
    host = torch.tensor(list(values), dtype=dtype)
    return host.pin_memory() if device.type == "cuda" and not is_capturing() else host


def _new_table(packed: bytes, host_steps: bool, device: torch.device) -> Batch:
    """The batch of these table entries."""
    entries = [struct.unpack_from(f"<{ROW.value}q", packed, at)
               for at in range(0, len(packed), 8 * ROW.value)]
    blocks = [entry[BLOCKS.value] for entry in entries]
    # 4 chunks a multiprocessor level the load; more than 64 blocks gain nothing
    fair = sum(blocks) // (4 * launches.processors(device))
    size = max(BLOCKS_AT_ONCE, min(64, fair // BLOCKS_AT_ONCE * BLOCKS_AT_ONCE))
    chunks = [n for i, count in enumerate(blocks) for c in range(-(-count // size)) for n in (i, c)]
    steps = torch.zeros(len(entries), dtype=torch.float32, device=device)
    if host_steps:
        entries = [(*entry[:STEP.value], steps[i:].data_ptr(), *entry[REST.value:])
                   for i, entry in enumerate(entries)]
    sources = (_on_host((n for entry in entries for n in entry), torch.int64, device),
               _on_host(chunks, torch.int32, device))
    table, chunk_table = (source.to(device, non_blocking=True) for source in sources)
    return Batch(table.view(-1, ROW.value), chunk_table, size,
                 torch.zeros(len(entries), 4, device=device),
                 torch.zeros(len(entries), dtype=torch.int64, device=device), steps, sources)


_table = functools.lru_cache(maxsize=64)(_new_table)  # the same entries, step after step
_captured: list[Batch] = []  # a CUDA graph repeats the copies and reads the tables while it lives


def batch_of(members: Sequence[Member], counts: Sequence[int] | None) -> Batch:
    """The batch of tensors of the same types; ``counts``: their steps where the host keeps them."""
    device = members[0].tensors[0].device
    packed = b"".join(
        struct.pack(f"<{ROW.value}q", *_entry(m, 0 if counts else m.step.data_ptr()))
        for m in members
    )
    capturing = is_capturing()  # then the table is not there before the graph is replayed
    batch = (_new_table if capturing else _table)(packed, counts is not None, device)
    if capturing:
        _captured.append(batch)
    if counts is not None:
        batch.steps.copy_(torch.tensor(counts, dtype=torch.float32))
    return batch


LANES = 128  # tensors whose scalars one program computes


def advance(batch: Batch, on_device: bool, lr: Tensor, beta1: float, beta2: float,
            weight_decay: float, maximize: bool, grad_scale: Tensor | None,
            found_inf: Tensor | None) -> None:
    """Count the steps (of those that the device keeps) and compute the scalars of this update."""
    table, tensors = batch.table, len(batch.table)
    scaler = [None if t is None else t.to(table.device) for t in (grad_scale, found_inf)]
    here = lr.device == table.device
    launch(_advance, (triton.cdiv(tensors, LANES),), table, batch.scalars, batch.now,
           lr if here else None, *scaler, tensors, 0.0 if here else lr.item(), beta1, beta2,
           weight_decay, ADVANCE=on_device, MAXIMIZE=maximize, LANES=LANES, num_warps=4, **EXACT)


def batches(members: Sequence[Member], counts: Sequence[int] | None = None,
            ) -> Iterator[tuple[Batch, list[tl.dtype | None]]]:
    """Batches of tensors of the same types, and the types: that of the masters (None without), then
    those of the tensors."""
    groups: dict[tuple[torch.dtype | None, ...], list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(member.types, []).append(i)
    for types, which in groups.items():
        batch = batch_of([members[i] for i in which],
                         None if counts is None else [counts[i] for i in which])
        yield batch, [None if t is None else TYPES[t] for t in types]


def counted(members: Sequence[Member], found_inf: Tensor | None,
            ) -> Iterator[tuple[Batch, bool, list[tl.dtype | None]]]:
    """:func:`batches` of an update, and whether the device keeps their steps.

    None if steps are kept on the host and ``found_inf`` says to skip: the host then counts none.
    """
    on_device = all(m.step.device == m.tensors[0].device for m in members)
    if not on_device and update.is_skipped(found_inf):
        return
    counts = None if on_device else update.advance([m.step for m in members])
    for batch, types in batches(members, counts):
        yield batch, on_device, types
