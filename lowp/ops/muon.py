"""muon: one update of many matrices, in place."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import ROUNDINGS, Op, deferred, require_choice
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.square_sums import square_sums
from lowp.reference import muon as reference
from lowp.reference.stores import Noise, fp32

ADJUSTMENTS = {"original": 0, "match_rms_adamw": 1}  # csrc/muon.h: Adjustment

muon = Op(
    "muon(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] momentum_scales, Tensor(d!)[] steps, Tensor lr, float momentum, bool nesterov, "
    "float[] ns_coefficients, float eps, int ns_steps, float weight_decay, str adjust_lr, "
    "bool maximize, str rounding, str state_rounding, int seed, int[] tensors, int[] offsets, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor(e!)[]? masters=None) -> ()"
)
"""Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024).

For each matrix [rows, cols], in fp32 registers::

    g = grad / grad_scale;  buf += (1 - momentum) (g - buf)
    x = g + momentum (buf - g) if nesterov, else buf
    x = x / max(|x|, eps)  (Frobenius), then ns_steps times, on the wide side up:
        x = a x + (b x xᵀ + c (x xᵀ)²) x
    p = p (1 - lr weight_decay) - rate x

and one rounding at each store. x and its products are bf16 with fp32 sums, each rounded once
(lowp::linear and lowp::linear_dgrad); the rest has the same bits on every backend. The rate is lr
times sqrt(max(1, rows / cols)) (``"original"``) or 0.2 sqrt(max(rows, cols))
(``"match_rms_adamw"``; Liu et al., "Muon is scalable for LLM training", 2025, section 2.2).

The CPU takes one matrix after the other. GPUs take the momentum of all and the step of all at once:
they hold x of all matrices in between, 4 bytes an element. Nothing waits where steps and lr are
on the device.

Args:
    params: fp32, bf16 or fp16 matrices; a strided one is updated through a copy.
    grads: like the params, of any float type.
    momentum_buffers: contiguous; floats, or int8 codes (lowp.reference.codec).
    momentum_scales: fp32 scales of the codes; empty tensors for float states.
    steps: 0-dim fp32 updates applied so far; each is advanced by one.
    lr: 0-dim.
    ns_coefficients: a, b, c.
    rounding, state_rounding, seed, tensors, offsets, grad_scale, found_inf, masters: as in
        :data:`lowp.ops.adamw.adamw`; a matrix must be whole.

Raises:
    TypeError, ValueError: lists, types or shapes that do not fit, an expanded parameter.
"""

_Tensors = Sequence[Tensor]


@muon.check
def _check(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors,
           momentum_scales: _Tensors, steps: _Tensors, lr: Tensor, momentum: float, nesterov: bool,
           ns_coefficients: Sequence[float], eps: float, ns_steps: int, weight_decay: float,
           adjust_lr: str, maximize: bool, rounding: str, state_rounding: str, seed: int,
           tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
           found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    require_choice("muon", "rounding", rounding, ROUNDINGS)
    require_choice("muon", "state_rounding", state_rounding, ROUNDINGS)
    require_choice("muon", "adjust_lr", adjust_lr, ADJUSTMENTS)
    update.require_float_lists("muon", params=params, grads=grads)
    update.require_lists("muon", params, grads=grads, momentum_buffers=momentum_buffers)
    update.require_sizes("muon", params, steps=steps, tensors=tensors, offsets=offsets,
                         momentum_scales=momentum_scales)
    update.require_states("muon", "momentum_buffers", torch.int8, momentum_buffers, momentum_scales)
    for i, p in enumerate(params):
        if p.dim() != 2:
            raise ValueError(
                f"lowp::muon: params[{i}] must be a matrix, got shape {tuple(p.shape)}"
            )
    if len(ns_coefficients) != 3:
        raise ValueError(
            f"lowp::muon: ns_coefficients must be 3 numbers, got {len(ns_coefficients)}"
        )
    update.require_in_place("muon", params)
    update.require_masters("muon", params, masters)


@muon.fake
def _fake(*args: object) -> None:
    return None


def rate_factors(p: Tensor, adjust_lr: str) -> tuple[float, float]:
    """What ``lr`` is multiplied by for a matrix of this shape, in fp64 and in this order."""
    rows, cols = p.shape
    if adjust_lr == "original":
        return 1.0, math.sqrt(max(1.0, rows / max(1, cols)))
    return 0.2, math.sqrt(max(rows, cols))


def rate_of(p: Tensor, lr: float, adjust_lr: str) -> float:
    """The step's rate for a matrix of this shape."""
    first, second = rate_factors(p, adjust_lr)
    return lr * first * second


@muon.kernel("reference")
def _reference(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors,
               momentum_scales: _Tensors, steps: _Tensors, lr: Tensor, momentum: float,
               nesterov: bool, ns_coefficients: Sequence[float], eps: float, ns_steps: int,
               weight_decay: float, adjust_lr: str, maximize: bool, rounding: str,
               state_rounding: str, seed: int, tensors: Sequence[int], offsets: Sequence[int],
               grad_scale: Tensor | None, found_inf: Tensor | None,
               masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    inv_scale = update.inv_scale_of(grad_scale)
    a, b, c = ns_coefficients
    for i, step in enumerate(update.advance(steps)):
        if params[i].numel() == 0:
            continue
        noise = Noise(seed, step, tensors[i], offsets[i])
        x = reference.momentum(grads[i], momentum_buffers[i], momentum_scales[i], momentum,
                               nesterov, maximize, inv_scale, state_rounding, noise)
        x = reference.orthogonalize(x, (a, b, c), eps, ns_steps)
        reference.step(params[i].detach(), x, masters[i] if masters else None, lr.item(),
                       rate_of(params[i], lr.item(), adjust_lr), weight_decay, rounding, noise)


def orthogonalize(xs: list[Tensor], coefficients: Sequence[float], eps: float,
                  steps: int) -> None:
    """As :func:`lowp.reference.muon.orthogonalize`, by lowp's products, each fp32 matrix in its
    place in the list. Nothing waits for the device."""
    a, b, c = map(fp32, coefficients)
    norms = square_sums(xs).sqrt().float().clamp_min(eps)
    for i, norm in enumerate(norms.unbind()):
        z = (xs[i] / norm).bfloat16()
        is_tall = z.shape[0] > z.shape[1]
        z = z.t() if is_tall else z
        for _ in range(steps if z.numel() else 0):
            gram = linear(z, z, None, "none", torch.bfloat16, False)[0]
            square = linear_dgrad(gram, gram, None, "none", torch.float32)
            polynomial = gram.float().mul_(b).add_(square.mul_(c)).bfloat16()
            higher = linear_dgrad(polynomial, z, None, "none", torch.float32)
            z = z.float().mul_(a).add_(higher).bfloat16()
        xs[i] = (z.t() if is_tall else z).contiguous()


@muon.kernel("cpu")
def _cpu(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors, momentum_scales: _Tensors,
         steps: _Tensors, lr: Tensor, momentum: float, nesterov: bool,
         ns_coefficients: Sequence[float], eps: float, ns_steps: int, weight_decay: float,
         adjust_lr: str, maximize: bool, rounding: str, state_rounding: str, seed: int,
         tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
         found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    counts = update.advance(steps)
    seed, threads, rate = seed & (2**64 - 1), torch.get_num_threads(), lr.item()
    for i, step in enumerate(counts):  # one at a time, so that one matrix's products exist at once
        with update.contiguous_params([params[i]]) as (p,):
            if p.numel() == 0:
                continue
            grad, buf = grads[i].contiguous(), momentum_buffers[i]
            xs = [torch.empty_like(p, dtype=torch.float32)]
            shape = update.rows_cols_of(p)
            row = update.sgd_row(xs[0], grad, buf, momentum_scales[i], shape, step, tensors[i],
                                 offsets[i])
            table = torch.frombuffer(bytearray(row), dtype=torch.int64)
            cpu_extension().muon_momentum(
                table.data_ptr(), 1, momentum, 1 - momentum, update.inv_scale_of(grad_scale),
                nesterov, maximize, ROUNDINGS[state_rounding], seed, threads,
            )
            orthogonalize(xs, ns_coefficients, eps, ns_steps)
            row = update.sgd_row(p, xs[0], None, None, shape, step, tensors[i], offsets[i])
            table = torch.frombuffer(bytearray(row), dtype=torch.int64)
            rates = torch.tensor([rate_of(p, rate, adjust_lr)], dtype=torch.float32)
            extra = struct.pack("<2q", *update.master_row(masters, i))
            weights = torch.frombuffer(bytearray(extra), dtype=torch.int64)
            cpu_extension().muon_step(
                table.data_ptr(), rates.data_ptr(), 1, 1 - rate * weight_decay,
                ROUNDINGS[rounding], seed, threads, weights.data_ptr(),
            )


@muon.kernel("cuda")
def _cuda(params: _Tensors, grads: _Tensors, momentum_buffers: _Tensors, momentum_scales: _Tensors,
          steps: _Tensors, lr: Tensor, momentum: float, nesterov: bool,
          ns_coefficients: Sequence[float], eps: float, ns_steps: int, weight_decay: float,
          adjust_lr: str, maximize: bool, rounding: str, state_rounding: str, seed: int,
          tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
          found_inf: Tensor | None, masters: _Tensors | None = None) -> None:
    if not params:
        return
    extension, place, device = device_table.extension_for(params)
    counts = device_table.DeviceSteps(steps, device, found_inf)
    if counts.skipped:
        return
    clock, _owners = device_table.clock_of(device, lr, weight_decay, (), grad_scale, found_inf)
    seed &= 2**64 - 1
    grads = [g.contiguous() for g in grads]
    xs = [torch.empty(p.shape, device=device) for p in params]
    table, _memory = device_table.upload_sgd(xs, grads, momentum_buffers, momentum_scales,
                                             counts.steps, tensors, offsets, None, device)
    extension.muon_momentum(place, clock, extension.SgdTable(*table), momentum, 1 - momentum,
                            nesterov, maximize, ROUNDINGS[state_rounding], seed)
    orthogonalize(xs, ns_coefficients, eps, ns_steps)
    with update.contiguous_params(params) as work:
        table, _memory = device_table.upload_sgd(work, xs, (), (), counts.steps, tensors, offsets,
                                                 masters, device)
        extension.muon_step(place, clock, extension.SgdTable(*table), ADJUSTMENTS[adjust_lr],
                            ROUNDINGS[rounding], seed)


muon.kernel("triton")(deferred("muon"))
