"""What the optimizer updates share: checks of their tensor lists, and how kernels see them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lowp import native
from lowp.ops.library import FLOATS
from lowp.reference.codec import BLOCK
from lowp.reference.stores import fp32

CODES = 3  # csrc/adamw.h: State
_DENSE = {torch.strided}
_SGD_ROW = struct.Struct("<12q")
STATE_TYPES = {**FLOATS, torch.int8: CODES, torch.uint8: CODES}


def require_lists(op: str, params: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    """ValueError unless every list has one tensor a parameter, of its shape and device."""
    shapes, devices = [p.shape for p in params], [p.device for p in params]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"lowp::{op}: {name} must have {len(params)} tensors, one a parameter, "
                f"got {len(tensors)}"
            )
        if [t.shape for t in tensors] == shapes and [t.device for t in tensors] == devices:
            continue
        for i, (t, shape, device) in enumerate(zip(tensors, shapes, devices, strict=True)):
            if t.shape != shape or t.device != device:
                raise ValueError(
                    f"lowp::{op}: {name}[{i}] must have shape {tuple(shape)} on {device}, "
                    f"got {tuple(t.shape)} on {t.device}"
                )


def require_float_lists(op: str, **lists: Sequence[Tensor]) -> None:
    """TypeError unless all tensors are dense and of a float type."""
    for name, tensors in lists.items():
        if {t.layout for t in tensors} <= _DENSE and {t.dtype for t in tensors} <= FLOATS.keys():
            continue
        for i, t in enumerate(tensors):
            if t.layout != torch.strided:
                raise TypeError(f"lowp::{op}: {name}[{i}] must be dense, got {t.layout}")
            if t.dtype not in FLOATS:
                raise TypeError(
                    f"lowp::{op}: {name}[{i}] must be float32, bfloat16 or float16, got {t.dtype}"
                )


def require_states(op: str, name: str, codes: torch.dtype, states: Sequence[Tensor],
                   scales: Sequence[Tensor]) -> None:
    """Raises unless each state is contiguous floats, or ``codes`` with fp32 scales of blocks."""
    contiguous = all([s.is_contiguous() for s in states])
    if contiguous and {s.dtype for s in states} <= FLOATS.keys():
        return
    for i, (state, scale) in enumerate(zip(states, scales, strict=True)):
        if state.dtype not in (*FLOATS, codes):
            raise TypeError(
                f"lowp::{op}: {name}[{i}] must be of a float type or {codes}, got {state.dtype}"
            )
        if not state.is_contiguous():
            raise ValueError(f"lowp::{op}: {name}[{i}] must be contiguous")
        if state.dtype == codes and (scale.dtype != torch.float32
                                     or tuple(scale.shape) != scale_shape(state)):
            raise ValueError(
                f"lowp::{op}: the scale of {name}[{i}] must be float32 {scale_shape(state)}, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )


def require_sizes(op: str, params: Sequence[Tensor], **lists: Sequence[object]) -> None:
    """ValueError unless every list has one entry a parameter."""
    for name, entries in lists.items():
        if len(entries) != len(params):
            raise ValueError(
                f"lowp::{op}: {name} must have {len(params)} entries, one a parameter, "
                f"got {len(entries)}"
            )


def require_masters(op: str, params: Sequence[Tensor], masters: Sequence[Tensor] | None) -> None:
    """Raises unless each master is empty, or contiguous, of its parameter's shape, and int16 beside
    bf16 or of the type of a 16-bit parameter."""
    if masters is None:
        return
    require_sizes(op, params, masters=masters)
    for i, (p, master) in enumerate(zip(params, masters, strict=True)):
        if master.numel() == 0:
            continue
        halves = {torch.bfloat16: (torch.int16, torch.bfloat16), torch.float16: (torch.float16,)}
        allowed = halves.get(p.dtype, ())
        if master.dtype not in allowed:
            raise TypeError(
                f"lowp::{op}: masters[{i}] of a {p.dtype} parameter must be of "
                f"{' or '.join(map(str, allowed)) or 'no type (empty)'}, got {master.dtype}"
            )
        if master.shape != p.shape or not master.is_contiguous() or master.device != p.device:
            raise ValueError(
                f"lowp::{op}: masters[{i}] must be contiguous, of shape {tuple(p.shape)} on "
                f"{p.device}, got {tuple(master.shape)} on {master.device}"
            )


REMAINDER, KAHAN = 1, 2  # csrc/adamw.h: Master


def master_row(masters: Sequence[Tensor] | None, index: int) -> tuple[int, int]:
    """The two words of csrc/adamw.h: MasterWeight."""
    if masters is None or masters[index].numel() == 0:
        return 0, 0
    master = masters[index]
    return master.data_ptr(), REMAINDER if master.dtype == torch.int16 else KAHAN


def sgd_row(p: Tensor, grad: Tensor, moment: Tensor | None, scale: Tensor | None,
            shape: tuple[int, int], step: int, tensor: int, offset: int) -> bytes:
    """One csrc/sgd.h: SgdTensor; ``shape`` is the parameter's as a matrix."""
    state = (0, 0, 0)
    if moment is not None and scale is not None:
        state = (moment.data_ptr(), scale.data_ptr(), STATE_TYPES[moment.dtype])
    return _SGD_ROW.pack(p.data_ptr(), grad.data_ptr(), *state[:2], *shape, FLOATS[p.dtype],
                         FLOATS[grad.dtype], state[2], step, tensor, offset)


def scale_shape(x: Tensor) -> tuple[int, ...]:
    """The shape of the scales of 8-bit codes: one a block of 256 along the last dimension."""
    if x.dim() == 0:
        return (1,)
    return (*x.shape[:-1], -(-x.shape[-1] // BLOCK))


def require_in_place(op: str, params: Sequence[Tensor]) -> None:
    """ValueError for a parameter of which one element lies under several indices."""
    for i, p in enumerate(params):
        if 0 in p.stride() and p.numel() > 1 and any(
            stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)
        ):
            raise ValueError(
                f"lowp::{op}: params[{i}] is expanded (strides {p.stride()}), so it cannot be "
                "updated in place; pass a contiguous tensor"
            )


def is_skipped(found_inf: Tensor | None) -> bool:
    """Whether a gradient scaler found Inf or NaN, so that nothing may change."""
    return found_inf is not None and bool(found_inf.item() != 0)


def inv_scale_of(grad_scale: Tensor | None) -> float:
    """1 / grad_scale, rounded once to fp32."""
    return 1.0 if grad_scale is None else fp32(1.0 / grad_scale.item())


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's first element lies; 0 for an empty one."""
    return list(map(Tensor.data_ptr, tensors))


def rows_cols_of(x: Tensor) -> tuple[int, int]:
    """A parameter as a matrix; a 0-dim one is 1 x 1."""
    cols = x.shape[-1] if x.dim() else 1
    return x.numel() // cols, cols


@contextmanager
def contiguous_params(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters, or contiguous copies that are copied back at the end."""
    work = [p if p.is_contiguous() else p.detach().contiguous() for p in params]
    yield work
    for p, w in zip(params, work, strict=True):
        if w is not p:
            p.detach().copy_(w)


def seed_of(seed: int, addition: int) -> int:
    """The seed of one of a step's additions, in 64 bits."""
    return seed + (addition << 32) & (2**64 - 1)


def advance(steps: Sequence[Tensor]) -> list[int]:
    """Count one applied update in every 0-dim fp32 step tensor; the new counts."""
    if native.cpu is not None and all(
        [s.is_cpu and s.dtype == torch.float32 and s.numel() == 1 for s in steps]
    ):
        counts: list[int] = native.cpu.advance_steps([s.data_ptr() for s in steps])
        return counts
    if steps:
        torch._foreach_add_(list(steps), 1.0)
    return [int(s) for s in steps]
