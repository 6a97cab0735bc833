"""accumulate: gradients added to totals of a low-precision type, with one rounding each."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import FLOATS, ROUNDINGS, Op, deferred, require_choice
from lowp.reference import accumulate as reference
from lowp.reference.stores import Noise

accumulate = Op(
    "accumulate(Tensor(a!)[] totals, Tensor[] grads, str rounding, int seed, Tensor step, "
    "int addition, int[] tensors, int[] offsets) -> ()"
)
"""``total = round(total + grad)`` for each tensor, summed in fp32.

A bf16 sum to nearest loses every gradient below half an ulp of the total; stochastically they are
kept in the mean (Gupta et al., "Deep learning with limited numerical precision", ICML 2015,
section 3). Error of one addition: half an ulp (nearest) or one (stochastic, unbiased) of the total.

Args:
    totals: fp32, bf16 or fp16, any shapes, written in place; a strided one through a copy.
    grads: like the totals, of any float type.
    rounding: ``"nearest"`` or ``"stochastic"``; fp32 totals are not rounded.
    seed, step, tensors, offsets: of the draws (:mod:`lowp.key`), role 8; ``step`` is 0-dim int64.
    addition: number of the addition within the step, from 1. Its draws have the seed
        seed + addition 2^32, so that no two additions share them.

Raises:
    TypeError, ValueError: lists, types or shapes that do not fit, an expanded total.
"""

_Tensors = Sequence[Tensor]


@accumulate.check
def _check(totals: _Tensors, grads: _Tensors, rounding: str, seed: int, step: Tensor,
           addition: int, tensors: Sequence[int], offsets: Sequence[int]) -> None:
    require_choice("accumulate", "rounding", rounding, ROUNDINGS)
    update.require_float_lists("accumulate", totals=totals, grads=grads)
    update.require_lists("accumulate", totals, grads=grads)
    update.require_sizes("accumulate", totals, tensors=tensors, offsets=offsets)
    update.require_in_place("accumulate", totals)


@accumulate.fake
def _fake(*args: object) -> None:
    return None


@accumulate.kernel("reference")
def _reference(totals: _Tensors, grads: _Tensors, rounding: str, seed: int, step: Tensor,
               addition: int, tensors: Sequence[int], offsets: Sequence[int]) -> None:
    for i, total in enumerate(totals):
        noise = Noise(update.seed_of(seed, addition), int(step), tensors[i], offsets[i])
        reference.accumulate(total.detach(), grads[i], rounding, noise)


@accumulate.kernel("cpu")
def _cpu(totals: _Tensors, grads: _Tensors, rounding: str, seed: int, step: Tensor, addition: int,
         tensors: Sequence[int], offsets: Sequence[int]) -> None:
    grads = [g.contiguous() for g in grads]
    table = bytearray()
    with update.contiguous_params(totals) as work:
        for i, total in enumerate(work):
            table += struct.pack(  # csrc/accumulate.h: AccumulateTensor
                "<8q", total.data_ptr(), grads[i].data_ptr(), total.numel(), FLOATS[total.dtype],
                FLOATS[grads[i].dtype], int(step), tensors[i], offsets[i],
            )
        if not table:
            return
        rows = torch.frombuffer(table, dtype=torch.int64)
        cpu_extension().accumulate(
            rows.data_ptr(), len(rows) // 8, ROUNDINGS[rounding], update.seed_of(seed, addition),
            torch.get_num_threads(),
        )


@accumulate.kernel("cuda")
def _cuda(totals: _Tensors, grads: _Tensors, rounding: str, seed: int, step: Tensor, addition: int,
          tensors: Sequence[int], offsets: Sequence[int]) -> None:
    if not totals:
        return
    extension, place, device = device_table.extension_for(totals)
    # on the device: in a CUDA graph every replay reads the step of its own
    beside = step.device == device
    now = step.long() if beside else torch.full((), int(step), device=device)
    grads = [g.contiguous() for g in grads]
    rows = []
    with update.contiguous_params(totals) as work:
        for i, total in enumerate(work):
            rows.append(struct.pack(  # csrc/accumulate.h: AccumulateTensor
                "<8q", total.data_ptr(), grads[i].data_ptr(), total.numel(), FLOATS[total.dtype],
                FLOATS[grads[i].dtype], 0, tensors[i], offsets[i],
            ))
        runs = [device_table.runs_of(1, total.numel(), 0) for total in work]
        table, _memory = device_table.upload_runs(rows, runs, device)
        extension.accumulate(
            place, extension.AccumulateTable(*table), ROUNDINGS[rounding],
            update.seed_of(seed, addition), now.data_ptr(),
        )


accumulate.kernel("triton")(deferred("accumulate"))
