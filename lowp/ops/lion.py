"""lion: one fused update of many tensors, in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import ROUNDINGS, Op, deferred, require_choice
from lowp.reference import lion as reference
from lowp.reference.stores import Noise

lion = Op(
    "lion(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales, "
    "Tensor(d!)[] steps, Tensor lr, float beta1, float beta2, float weight_decay, bool maximize, "
    "str rounding, str state_rounding, int seed, int[] tensors, int[] offsets, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor(e!)[]? masters=None) -> ()"
)
"""Lion (Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2).

For each tensor, in fp32 registers::

    g = grad / grad_scale
    p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)
    m = beta2 m + (1 - beta2) g

and one rounding at each store; sign(0) = 0, and a NaN stays one.

Args:
    params: fp32, bf16 or fp16, any shapes; a strided one is updated through a copy.
    grads: like the params, of any float type.
    exp_avgs: contiguous; floats, or int8 codes (lowp.reference.codec) of blocks of 256 along the
        last dimension.
    exp_avg_scales: fp32 scales of the codes; empty tensors for float states.
    steps: 0-dim fp32 updates applied so far; each is advanced by one.
    lr: 0-dim.
    rounding, state_rounding, seed, tensors, offsets, grad_scale, found_inf, masters: as in
        :data:`lowp.ops.adamw.adamw`.

Raises:
    TypeError, ValueError: lists, types or shapes that do not fit, an expanded parameter.
"""

_Tensors = Sequence[Tensor]


@lion.check
def _check(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_scales: _Tensors,
           steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float,
           maximize: bool, rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
           offsets: Sequence[int], grad_scale: Tensor | None, found_inf: Tensor | None,
           masters: _Tensors | None = None) -> None:
    require_choice("lion", "rounding", rounding, ROUNDINGS)
    require_choice("lion", "state_rounding", state_rounding, ROUNDINGS)
    update.require_float_lists("lion", params=params, grads=grads)
    update.require_lists("lion", params, grads=grads, exp_avgs=exp_avgs)
    update.require_sizes("lion", params, steps=steps, tensors=tensors, offsets=offsets,
                         exp_avg_scales=exp_avg_scales)
    update.require_states("lion", "exp_avgs", torch.int8, exp_avgs, exp_avg_scales)
    update.require_in_place("lion", params)
    update.require_masters("lion", params, masters)


@lion.fake
def _fake(*args: object) -> None:
    return None


@lion.kernel("reference")
def _reference(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_scales: _Tensors,
               steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float,
               maximize: bool, rounding: str, state_rounding: str, seed: int,
               tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
               found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    inv_scale = update.inv_scale_of(grad_scale)
    for i, step in enumerate(update.advance(steps)):
        reference.lion(params[i].detach(), grads[i], exp_avgs[i], exp_avg_scales[i],
                       masters[i] if masters else None, lr.item(), beta1, beta2, weight_decay,
                       maximize, inv_scale, rounding, state_rounding,
                       Noise(seed, step, tensors[i], offsets[i]))


@lion.kernel("cpu")
def _cpu(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_scales: _Tensors,
         steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float,
         maximize: bool, rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
         offsets: Sequence[int], grad_scale: Tensor | None, found_inf: Tensor | None,
         masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    rate = lr.item()
    grads = [g.contiguous() for g in grads]
    table, extras = bytearray(), bytearray()
    with update.contiguous_params(params) as work:
        for i, step in enumerate(update.advance(steps)):
            p, m = work[i], exp_avgs[i]
            if p.numel() == 0:
                continue
            table += update.sgd_row(p, grads[i], m, exp_avg_scales[i], update.rows_cols_of(p), step,
                                    tensors[i], offsets[i])
            extras += struct.pack("<2q", *update.master_row(masters, i))
        if not table:
            return
        rows = torch.frombuffer(table, dtype=torch.int64)
        weights = torch.frombuffer(extras, dtype=torch.int64)
        cpu_extension().lion(
            rows.data_ptr(), len(rows) // 12, rate, beta1, 1 - beta1, beta2, 1 - beta2,
            1 - rate * weight_decay, update.inv_scale_of(grad_scale), maximize,
            ROUNDINGS[rounding], ROUNDINGS[state_rounding], seed & (2**64 - 1),
            torch.get_num_threads(), weights.data_ptr() if masters else 0,
        )


@lion.kernel("cuda")
def _cuda(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_scales: _Tensors,
          steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float,
          maximize: bool, rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
          offsets: Sequence[int], grad_scale: Tensor | None, found_inf: Tensor | None,
          masters: _Tensors | None = None) -> None:
    if not params:
        return
    extension, place, device = device_table.extension_for(params)
    counts = device_table.DeviceSteps(steps, device, found_inf)
    if counts.skipped:
        return
    grads = [g.contiguous() for g in grads]
    with update.contiguous_params(params) as work:
        table, _memory = device_table.upload_sgd(work, grads, exp_avgs, exp_avg_scales,
                                                 counts.steps, tensors, offsets, masters, device)
        clock, _owners = device_table.clock_of(device, lr, weight_decay, (), grad_scale, found_inf)
        extension.lion(
            place, clock, extension.SgdTable(*table), beta1, 1 - beta1, beta2, 1 - beta2, maximize,
            ROUNDINGS[rounding], ROUNDINGS[state_rounding], seed & (2**64 - 1),
        )


lion.kernel("triton")(deferred("lion"))
