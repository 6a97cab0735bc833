"""adamw: one fused update of many tensors, in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import FLOATS, ROUNDINGS, Op, deferred, require_choice
from lowp.reference import adamw as reference
from lowp.reference.stores import Noise

adamw = Op(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] max_exp_avg_sqs, "
    "Tensor(g!)[] steps, Tensor lr, float beta1, float beta2, float weight_decay, float eps, "
    "bool maximize, str rounding, str state_rounding, int seed, int[] tensors, int[] offsets, "
    "Tensor? grad_scale, Tensor? found_inf, bool coupled=False, Tensor(h!)[]? masters=None) -> ()"
)
"""AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2).

For each tensor, in fp32 registers::

    g = grad / grad_scale
    m += (1 - beta1) (g - m);  v += (1 - beta2) (g g - v)
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

and one rounding at each store. The update uses the fresh m and v, not what was stored of them.
``coupled`` makes it Adam (Kingma and Ba, ICLR 2015, algorithm 1) with L2 regularization: g gets
weight_decay p, and p does not decay by itself.

Args:
    params: fp32, bf16 or fp16, any shapes; a strided one is updated through a copy.
    grads: like the params, of any float type.
    exp_avgs, exp_avg_sqs: contiguous; floats, or int8 and uint8 codes (lowp.reference.codec; the
        latter of the square root) of blocks of 256 along the last dimension.
    exp_avg_scales, exp_avg_sq_scales: fp32 scales of the codes; empty tensors for float states.
    max_exp_avg_sqs: largest second moments (AMSGrad), floats; an empty list without.
    steps: 0-dim fp32 updates applied so far; each is advanced by one.
    lr: 0-dim.
    rounding, state_rounding: of params and of states that are not fp32: ``"nearest"`` or
        ``"stochastic"``.
    seed, tensors, offsets: of the draws: one 32-bit id and the global index of the first element a
        tensor (:mod:`lowp.key`).
    grad_scale, found_inf: of a gradient scaler; if ``found_inf`` is not 0, nothing changes.
    coupled: Adam instead of AdamW.
    masters: what 16-bit params lack: int16 low bits of bf16 ones, so that both are the exact fp32
        weight (``rounding`` is then without use); or, in the params' type, what rounding the param
        to nearest lost (Kahan's compensation; Zamirai et al., "Revisiting BFloat16 training", 2020,
        section 3), which is stored with ``rounding``; empty tensors for params without.

Raises:
    TypeError, ValueError: lists, types or shapes that do not fit, an expanded parameter.
"""

_Tensors = Sequence[Tensor]
_ROW, _SCALARS = struct.Struct("<16q"), struct.Struct("<2f")


@adamw.check
def _check(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors,
           exp_avg_scales: _Tensors, exp_avg_sq_scales: _Tensors, max_exp_avg_sqs: _Tensors,
           steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
           maximize: bool, rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
           offsets: Sequence[int], grad_scale: Tensor | None, found_inf: Tensor | None,
           coupled: bool = False, masters: _Tensors | None = None) -> None:
    require_choice("adamw", "rounding", rounding, ROUNDINGS)
    require_choice("adamw", "state_rounding", state_rounding, ROUNDINGS)
    update.require_float_lists("adamw", params=params, grads=grads,
                               max_exp_avg_sqs=max_exp_avg_sqs)
    update.require_lists("adamw", params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if max_exp_avg_sqs:
        update.require_lists("adamw", params, max_exp_avg_sqs=max_exp_avg_sqs)
    update.require_sizes("adamw", params, steps=steps, tensors=tensors, offsets=offsets,
                         exp_avg_scales=exp_avg_scales, exp_avg_sq_scales=exp_avg_sq_scales)
    update.require_states("adamw", "exp_avgs", torch.int8, exp_avgs, exp_avg_scales)
    update.require_states("adamw", "exp_avg_sqs", torch.uint8, exp_avg_sqs, exp_avg_sq_scales)
    for i, (m, v) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if m.dtype != v.dtype and m.dtype != torch.int8:
            raise TypeError(
                f"lowp::adamw: exp_avgs[{i}] and exp_avg_sqs[{i}] must be of one type (or int8 "
                f"and uint8), got {m.dtype} and {v.dtype}"
            )
    update.require_in_place("adamw", params)
    update.require_masters("adamw", params, masters)


@adamw.fake
def _fake(*args: object) -> None:
    return None


@adamw.kernel("reference")
def _reference(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors,
               exp_avg_scales: _Tensors, exp_avg_sq_scales: _Tensors, max_exp_avg_sqs: _Tensors,
               steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float,
               eps: float, maximize: bool, rounding: str, state_rounding: str, seed: int,
               tensors: Sequence[int], offsets: Sequence[int], grad_scale: Tensor | None,
               found_inf: Tensor | None, coupled: bool = False,
               masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    inv_scale = update.inv_scale_of(grad_scale)
    for i, step in enumerate(update.advance(steps)):
        reference.adamw(
            params[i].detach(), grads[i], exp_avgs[i], exp_avg_sqs[i], exp_avg_scales[i],
            exp_avg_sq_scales[i], max_exp_avg_sqs[i] if max_exp_avg_sqs else None, lr.item(),
            beta1, beta2, weight_decay, eps, maximize, inv_scale, rounding, state_rounding,
            Noise(seed, step, tensors[i], offsets[i]), coupled, masters[i] if masters else None,
        )


class Table:
    """What the CPU kernel takes, of contiguous tensors that were checked; arguments as the op's."""

    def __init__(self, params: _Tensors, grads: _Tensors, exp_avgs: _Tensors,
                 exp_avg_sqs: _Tensors, exp_avg_scales: _Tensors, exp_avg_sq_scales: _Tensors,
                 max_exp_avg_sqs: _Tensors, tensors: Sequence[int], offsets: Sequence[int],
                 masters: _Tensors | None) -> None:
        at, none = update.addresses, [0] * len(params)
        shapes = [update.rows_cols_of(p) if p.numel() else (0, 1) for p in params]
        rows = bytearray().join(map(  # a column a word of csrc/adamw.h: AdamWTensor
            _ROW.pack, at(params), at(grads), at(exp_avgs), at(exp_avg_sqs), at(exp_avg_scales),
            at(exp_avg_sq_scales), at(max_exp_avg_sqs) or none, [s[0] for s in shapes],
            [s[1] for s in shapes], [FLOATS[p.dtype] for p in params],
            [FLOATS[g.dtype] for g in grads], [update.STATE_TYPES[m.dtype] for m in exp_avgs],
            [FLOATS[m.dtype] for m in max_exp_avg_sqs] or none, none, tensors, offsets,
        ))
        self.rows = torch.frombuffer(rows, dtype=torch.int64).view(-1, 16)
        self.masters = torch.tensor([update.master_row(masters, i) for i in range(len(params))]
                                    if masters else [], dtype=torch.int64)

    def replace_grads(self, addresses: list[int]) -> None:
        """Take other gradients, of the same types and shapes."""
        self.rows[:, 1] = torch.tensor(addresses)

    def run(self, counts: Sequence[int], lr: float, beta1: float, beta2: float,
            weight_decay: float, eps: float, maximize: bool, rounding: str, state_rounding: str,
            seed: int, grad_scale: Tensor | None, coupled: bool) -> None:
        """The update that is each tensor's ``counts``-th."""
        self.rows[:, 13] = torch.tensor(counts)
        of_count = {n: _SCALARS.pack(*reference.scalars(n, lr, beta1, beta2)) for n in set(counts)}
        scalars = torch.frombuffer(bytearray().join([of_count[n] for n in counts]),
                                   dtype=torch.float32)
        cpu_extension().adamw(
            self.rows.data_ptr(), scalars.data_ptr(), len(counts), 1 - beta1, 1 - beta2, eps,
            1.0 if coupled else 1 - lr * weight_decay, update.inv_scale_of(grad_scale), maximize,
            ROUNDINGS[rounding], ROUNDINGS[state_rounding], seed & (2**64 - 1),
            torch.get_num_threads(), weight_decay if coupled else 0.0, self.masters.data_ptr(),
        )


@adamw.kernel("cpu")
def _cpu(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors,
         exp_avg_scales: _Tensors, exp_avg_sq_scales: _Tensors, max_exp_avg_sqs: _Tensors,
         steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
         maximize: bool, rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
         offsets: Sequence[int], grad_scale: Tensor | None, found_inf: Tensor | None,
         coupled: bool = False, masters: _Tensors | None = None) -> None:
    if update.is_skipped(found_inf):
        return
    counts = update.advance(steps)
    if not counts:
        return
    grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    maxima = [m.contiguous() for m in max_exp_avg_sqs]
    with update.contiguous_params(params) as work:
        table = Table(work, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, maxima,
                      tensors, offsets, masters)
        table.run(counts, lr.item(), beta1, beta2, weight_decay, eps, maximize, rounding,
                  state_rounding, seed, grad_scale, coupled)
    for m, work_m in zip(max_exp_avg_sqs, maxima, strict=True):
        if m.data_ptr() != work_m.data_ptr():
            m.copy_(work_m)


@adamw.kernel("cuda")
def _cuda(params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors,
          exp_avg_scales: _Tensors, exp_avg_sq_scales: _Tensors, max_exp_avg_sqs: _Tensors,
          steps: _Tensors, lr: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float,
          maximize: bool, rounding: str, state_rounding: str, seed: int, tensors: Sequence[int],
          offsets: Sequence[int], grad_scale: Tensor | None, found_inf: Tensor | None,
          coupled: bool = False, masters: _Tensors | None = None) -> None:
    if not params:
        return
    extension, place, device = device_table.extension_for(params)
    counts = device_table.DeviceSteps(steps, device, found_inf)
    if counts.skipped:
        return
    grads = [g.contiguous() for g in grads]
    maxima = [m.contiguous() for m in max_exp_avg_sqs]
    rows, runs, extras = [], [], []
    with update.contiguous_params(params) as work:
        for i, (p, m, v) in enumerate(zip(work, exp_avgs, exp_avg_sqs, strict=True)):
            shape, state_type = device_table.matrix_of(p), update.STATE_TYPES[m.dtype]
            rows.append(struct.pack(  # csrc/adamw.h: AdamWTensor
                "<16q", p.data_ptr(), grads[i].data_ptr(), m.data_ptr(), v.data_ptr(),
                exp_avg_scales[i].data_ptr(), exp_avg_sq_scales[i].data_ptr(),
                maxima[i].data_ptr() if maxima else 0, *shape, FLOATS[p.dtype],
                FLOATS[grads[i].dtype], state_type, FLOATS[maxima[i].dtype] if maxima else 0, 0,
                tensors[i], offsets[i],
            ))
            if masters:
                extras.append(struct.pack("<2q", *update.master_row(masters, i)))
            runs.append(device_table.runs_of(*shape, state_type))
        table, _memory = device_table.upload(rows, counts.steps, runs, device, extras)
        decay, coupled_decay = (0.0, weight_decay) if coupled else (weight_decay, 0.0)
        clock, _owners = device_table.clock_of(device, lr, decay, (beta1, beta2), grad_scale,
                                               found_inf)
        extension.adamw(
            place, clock, extension.AdamWTable(*table), 1 - beta1, 1 - beta2, eps, maximize,
            ROUNDINGS[rounding], ROUNDINGS[state_rounding], seed & (2**64 - 1), coupled_decay,
        )
    for m, work_m in zip(max_exp_avg_sqs, maxima, strict=True):
        if m.data_ptr() != work_m.data_ptr():
            m.copy_(work_m)


adamw.kernel("triton")(deferred("adamw"))
