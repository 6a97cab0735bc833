"""adafactor: one update of many tensors, in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import FLOATS, ROUNDINGS, Op, deferred, require_choice
from lowp.reference import adafactor as reference
from lowp.reference.square_sums import RUN
from lowp.reference.stores import Noise

adafactor = Op(
    "adafactor(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] row_vars, Tensor(c!)[] col_vars, "
    "Tensor(d!)[] variances, Tensor(e!)[] steps, Tensor lr, float beta2_decay, float eps1, "
    "float eps2, float d, float weight_decay, bool maximize, str rounding, int seed, "
    "int[] tensors, int[] offsets, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(f!)[]? masters=None) -> ()"
)
"""Adafactor without momentum (Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear
memory cost", ICML 2018, algorithms 4 and 5), with the rate as torch defines it.

For each matrix [rows, cols] (of more dimensions: for each of the last two), in fp32 registers::

    g = grad / grad_scale;  w = t^beta2_decay
    row_var += w (mean of g g over cols - row_var);  col_var += w (mean of g g over rows - col_var)
    u = g / sqrt(max(row_var col_var / max(mean of row_var, eps1), eps1 eps1))
    p = p (1 - lr weight_decay) - min(lr, 1 / sqrt(t)) max(eps2, rms(p)) u / max(1, rms(u) / d)

and one rounding at the store of p; a vector keeps the mean of g g of every element instead. Means
and rms are fp64 sums of one order (lowp.reference.square_sums), so no bit depends on threads.

Args:
    params: fp32, bf16 or fp16, any shapes; a strided one is updated through a copy.
    grads: like the params, of any float type.
    row_vars, col_vars: contiguous fp32, [..., rows, 1] and [..., 1, cols]; empty for vectors.
    variances: contiguous fp32, of vectors; empty for matrices.
    steps: 0-dim fp32 updates applied so far; each is advanced by one.
    lr: 0-dim.
    rounding, seed, tensors, offsets, grad_scale, found_inf, masters: as in
        :data:`lowp.ops.adamw.adamw`; a tensor must be whole, as its means are.

Raises:
    TypeError, ValueError: lists, types or shapes that do not fit, an expanded parameter.
"""

_Tensors = Sequence[Tensor]


def _require_fp32(name: str, i: int, state: Tensor, shape: tuple[int, ...]) -> None:
    if state.dtype != torch.float32 or tuple(state.shape) != shape or not state.is_contiguous():
        raise ValueError(
            f"lowp::adafactor: {name}[{i}] must be contiguous float32 {shape}, got {state.dtype} "
            f"{tuple(state.shape)}"
        )


@adafactor.check
def _check(params: _Tensors, grads: _Tensors, row_vars: _Tensors, col_vars: _Tensors,
           variances: _Tensors, steps: _Tensors, lr: Tensor, beta2_decay: float, eps1: float,
           eps2: float, d: float, weight_decay: float, maximize: bool, rounding: str, seed: int,
           tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
           found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    require_choice("adafactor", "rounding", rounding, ROUNDINGS)
    update.require_float_lists("adafactor", params=params, grads=grads)
    update.require_lists("adafactor", params, grads=grads)
    update.require_sizes("adafactor", params, row_vars=row_vars, col_vars=col_vars,
                         variances=variances, steps=steps, tensors=tensors, offsets=offsets)
    for i, p in enumerate(params):
        if p.dim() > 1:
            _require_fp32("row_vars", i, row_vars[i], (*p.shape[:-1], 1))
            _require_fp32("col_vars", i, col_vars[i], (*p.shape[:-2], 1, p.shape[-1]))
        else:
            _require_fp32("variances", i, variances[i], tuple(p.shape))
    update.require_in_place("adafactor", params)
    update.require_masters("adafactor", params, masters)


@adafactor.fake
def _fake(*args: object) -> None:
    return None


@adafactor.kernel("reference")
def _reference(params: _Tensors, grads: _Tensors, row_vars: _Tensors, col_vars: _Tensors,
               variances: _Tensors, steps: _Tensors, lr: Tensor, beta2_decay: float, eps1: float,
               eps2: float, d: float, weight_decay: float, maximize: bool, rounding: str,
               seed: int, tensors: Sequence[int], offsets: Sequence[int],
               grad_scale: Tensor | None, found_inf: Tensor | None,
               masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    inv_scale = update.inv_scale_of(grad_scale)
    for i, step in enumerate(update.advance(steps)):
        if params[i].numel() == 0:
            continue
        reference.adafactor(params[i].detach(), grads[i], row_vars[i], col_vars[i], variances[i],
                            masters[i] if masters else None, lr.item(), beta2_decay, eps1, eps2, d,
                            weight_decay, maximize, inv_scale, rounding,
                            Noise(seed, step, tensors[i], offsets[i]))


def _matrices(p: Tensor) -> tuple[int, int, int]:
    """batch, rows and cols as csrc/adafactor.h counts them."""
    if p.dim() < 2:
        return 1, 1, p.numel()
    return p.shape[:-2].numel(), p.shape[-2], p.shape[-1]


def matrices_of(p: Tensor) -> tuple[int, int, int]:
    """The same without the one matrix of a vector or an empty tensor, which keeps no means."""
    batch, rows, cols = _matrices(p)
    return 0 if p.dim() < 2 or p.numel() == 0 else batch, rows, cols


@adafactor.kernel("cpu")
def _cpu(params: _Tensors, grads: _Tensors, row_vars: _Tensors, col_vars: _Tensors,
         variances: _Tensors, steps: _Tensors, lr: Tensor, beta2_decay: float, eps1: float,
         eps2: float, d: float, weight_decay: float, maximize: bool, rounding: str, seed: int,
         tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
         found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    rate = lr.item()
    grads = [g.contiguous() for g in grads]
    table, scalars, extras = bytearray(), bytearray(), bytearray()
    with update.contiguous_params(params) as work:
        for i, step in enumerate(update.advance(steps)):
            p = work[i]
            if p.numel() == 0:
                continue
            vector = p.dim() < 2
            table += struct.pack(  # csrc/adafactor.h: AdafactorTensor
                "<13q", p.data_ptr(), grads[i].data_ptr(), 0 if vector else row_vars[i].data_ptr(),
                0 if vector else col_vars[i].data_ptr(), variances[i].data_ptr() if vector else 0,
                *_matrices(p), FLOATS[p.dtype], FLOATS[grads[i].dtype], step, tensors[i],
                offsets[i],
            )
            scalars += struct.pack("<2d", *reference.scalars(step, rate, beta2_decay))
            extras += struct.pack("<2q", *update.master_row(masters, i))
        if not table:
            return
        rows = torch.frombuffer(table, dtype=torch.int64)
        doubles = torch.frombuffer(scalars, dtype=torch.float64)
        weights = torch.frombuffer(extras, dtype=torch.int64)
        cpu_extension().adafactor(
            rows.data_ptr(), doubles.data_ptr(), len(rows) // 13, eps1, eps2, d,
            1 - rate * weight_decay, update.inv_scale_of(grad_scale), maximize,
            ROUNDINGS[rounding], seed & (2**64 - 1), torch.get_num_threads(),
            weights.data_ptr() if masters else 0,
        )


@adafactor.kernel("cuda")
def _cuda(params: _Tensors, grads: _Tensors, row_vars: _Tensors, col_vars: _Tensors,
          variances: _Tensors, steps: _Tensors, lr: Tensor, beta2_decay: float, eps1: float,
          eps2: float, d: float, weight_decay: float, maximize: bool, rounding: str, seed: int,
          tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
          found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if not params:
        return
    extension, place, device = device_table.extension_for(params)
    counts = device_table.DeviceSteps(steps, device, found_inf)
    if counts.skipped:
        return
    grads = [g.contiguous() for g in grads]
    table, sizes = [], []
    with update.contiguous_params(params) as work:
        for i, p in enumerate(work):
            vector, (matrices, rows, cols) = p.dim() < 2, matrices_of(p)
            table.append(struct.pack(  # csrc/adafactor.h: AdafactorTensor
                "<13q", p.data_ptr(), grads[i].data_ptr(), 0 if vector else row_vars[i].data_ptr(),
                0 if vector else col_vars[i].data_ptr(), variances[i].data_ptr() if vector else 0,
                *_matrices(p), FLOATS[p.dtype], FLOATS[grads[i].dtype], 0, tensors[i], offsets[i],
            ))
            sizes.append((-(-p.numel() // RUN), matrices * rows, matrices * -(-cols // 8),
                          matrices))
        extras = [struct.pack("<2q", *update.master_row(masters, i))
                  for i in range(len(work) if masters else 0)]
        parts, totals, _memory = device_table.upload_sizes(table, counts.steps, sizes, device,
                                                           extras)
        clock, _owners = device_table.clock_of(device, lr, weight_decay, (), grad_scale, found_inf)
        states = torch.empty(len(work), 4, dtype=torch.float64, device=device)
        sums = states.new_empty(2, totals[0])
        means = torch.empty(totals[3], device=device)
        extension.adafactor(
            place, clock,
            extension.AdafactorTable(*parts, states.data_ptr(), sums.data_ptr(),
                                     sums.data_ptr() + 8 * totals[0], means.data_ptr(), len(work)),
            beta2_decay, eps1, eps2, d, maximize, ROUNDINGS[rounding], seed & (2**64 - 1), *totals,
        )


adafactor.kernel("triton")(deferred("adafactor"))
