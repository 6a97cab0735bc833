"""sgd: one fused update of many tensors, in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import ROUNDINGS, Op, deferred, require_choice
from lowp.reference import sgd as reference
from lowp.reference.stores import Noise

sgd = Op(
    "sgd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] momentum_scales, Tensor(d!)[] steps, Tensor lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, str rounding, str state_rounding, int seed, "
    "int[] tensors, int[] offsets, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!)[]? masters=None) -> ()"
)
"""SGD with momentum as torch defines it (Sutskever et al., ICML 2013, with the rate outside).

For each tensor, in fp32 registers::

    d = grad / grad_scale + weight_decay p
    buf = d at the first step, else momentum buf + (1 - dampening) d
    d = d + momentum buf if nesterov, else buf
    p = p - lr d

and one rounding at each store.

Args:
    params: fp32, bf16 or fp16, any shapes; a strided one is updated through a copy.
    grads: like the params, of any float type.
    momentum_buffers: contiguous; floats, or int8 codes (lowp.reference.codec) of blocks of 256
        along the last dimension; an empty list without momentum.
    momentum_scales: fp32 scales of the codes; empty tensors for float states, or an empty list.
    steps: 0-dim fp32 updates applied so far; each is advanced by one.
    lr: 0-dim.
    rounding, state_rounding, seed, tensors, offsets, grad_scale, found_inf, masters: as in
        :data:`lowp.ops.adamw.adamw`.

Raises:
    TypeError, ValueError: lists, types or shapes that do not fit, an expanded parameter.
"""

_Tensors = Sequence[Tensor]


@sgd.check
def _check(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors, momentum_scales: _Tensors,
           steps: _Tensors, lr: Tensor, momentum: float, dampening: float, weight_decay: float,
           nesterov: bool, maximize: bool, rounding: str, state_rounding: str, seed: int,
           tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
           found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    require_choice("sgd", "rounding", rounding, ROUNDINGS)
    require_choice("sgd", "state_rounding", state_rounding, ROUNDINGS)
    update.require_float_lists("sgd", params=params, grads=grads)
    update.require_lists("sgd", params, grads=grads)
    update.require_sizes("sgd", params, steps=steps, tensors=tensors, offsets=offsets)
    if momentum_buffers:
        update.require_lists("sgd", params, momentum_buffers=momentum_buffers)
        update.require_sizes("sgd", params, momentum_scales=momentum_scales)
    update.require_states("sgd", "momentum_buffers", torch.int8, momentum_buffers, momentum_scales)
    update.require_in_place("sgd", params)
    update.require_masters("sgd", params, masters)


@sgd.fake
def _fake(*args: object) -> None:
    return None


@sgd.kernel("reference")
def _reference(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors,
               momentum_scales: _Tensors, steps: _Tensors, lr: Tensor, momentum: float,
               dampening: float, weight_decay: float, nesterov: bool, maximize: bool,
               rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
               offsets: Sequence[int], grad_scale: Tensor | None,
               found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    inv_scale = update.inv_scale_of(grad_scale)
    for i, step in enumerate(update.advance(steps)):
        buffer = momentum_buffers[i] if momentum_buffers else None
        scale = momentum_scales[i] if momentum_scales else params[i].new_empty(0)
        reference.sgd(params[i].detach(), grads[i], buffer, scale, lr.item(), momentum, dampening,
                      weight_decay, nesterov, maximize, inv_scale, rounding, state_rounding,
                      Noise(seed, step, tensors[i], offsets[i]),
                      masters[i] if masters else None)


@sgd.kernel("cpu")
def _cpu(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors, momentum_scales: _Tensors,
         steps: _Tensors, lr: Tensor, momentum: float, dampening: float, weight_decay: float,
         nesterov: bool, maximize: bool, rounding: str, state_rounding: str, seed: int,
         tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
         found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    grads = [g.contiguous() for g in grads]
    table, extras = bytearray(), bytearray()
    with update.contiguous_params(params) as work:
        for i, step in enumerate(update.advance(steps)):
            p = work[i]
            if p.numel() == 0:
                continue
            buffer, scale = (momentum_buffers[i], momentum_scales[i]) if momentum_buffers else \
                (None, None)
            table += update.sgd_row(p, grads[i], buffer, scale, update.rows_cols_of(p), step,
                                    tensors[i], offsets[i])
            extras += struct.pack("<2q", *update.master_row(masters, i))
        if not table:
            return
        rows = torch.frombuffer(table, dtype=torch.int64)
        weights = torch.frombuffer(extras, dtype=torch.int64)
        cpu_extension().sgd(
            rows.data_ptr(), len(rows) // 12, lr.item(), momentum, 1 - dampening, weight_decay,
            update.inv_scale_of(grad_scale), nesterov, maximize, ROUNDINGS[rounding],
            ROUNDINGS[state_rounding], seed & (2**64 - 1), torch.get_num_threads(),
            weights.data_ptr() if masters else 0,
        )


@sgd.kernel("cuda")
def _cuda(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors, momentum_scales: _Tensors,
          steps: _Tensors, lr: Tensor, momentum: float, dampening: float, weight_decay: float,
          nesterov: bool, maximize: bool, rounding: str, state_rounding: str, seed: int,
          tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
          found_inf: Tensor | None,
          masters: _Tensors | None = None) -> None:
    if not params:
        return
    extension, place, device = device_table.extension_for(params)
    counts = device_table.DeviceSteps(steps, device, found_inf)
    if counts.skipped:
        return
    grads = [g.contiguous() for g in grads]
    with update.contiguous_params(params) as work:
        table, _memory = device_table.upload_sgd(work, grads, momentum_buffers, momentum_scales,
                                                 counts.steps, tensors, offsets, masters, device)
        clock, _owners = device_table.clock_of(device, lr, weight_decay, (), grad_scale, found_inf)
        extension.sgd(
            place, clock, extension.SgdTable(*table), momentum, 1 - dampening, weight_decay,
            nesterov, maximize, ROUNDINGS[rounding], ROUNDINGS[state_rounding], seed & (2**64 - 1),
        )


sgd.kernel("triton")(deferred("sgd"))
