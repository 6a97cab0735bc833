"""What an optimizer update hands to its CUDA kernel: one table in device memory for all tensors."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowp.native import cuda_extension, cuda_place
from lowp.ops.update import (
    CODES,
    STATE_TYPES,
    is_skipped,
    master_row,
    rows_cols_of,
    sgd_row,
)
from lowp.reference.codec import BLOCK

_KEPT = 16
_kept: dict[tuple[Any, ...], Tensor] = {}


def matrix_of(x: Tensor) -> tuple[int, int]:
    """A tensor as a matrix; an empty one, whose step counts too, has no rows."""
    return rows_cols_of(x) if x.numel() else (0, 1)


def runs_of(rows: int, cols: int, state_type: int) -> int:
    """The runs of up to 256 elements that a tensor is updated in (csrc/cuda/states.h)."""
    if state_type == CODES:
        return rows * -(-cols // BLOCK)
    return -(-rows * cols // BLOCK)


class DeviceSteps:
    """The 0-dim fp32 step counts of an update, where its kernel advances them.

    Steps that lie on the parameters' device are advanced there, so nothing waits and a captured
    graph counts on. Others are copied for the kernel and advanced here; then ``found_inf`` is
    waited for.
    """

    def __init__(self, steps: Sequence[Tensor], device: torch.device,
                 found_inf: Tensor | None) -> None:
        self.skipped = False
        self.steps = list(steps)
        if any(s.device != device for s in steps):
            self.skipped = is_skipped(found_inf)
            copied = torch.stack([s.float().cpu() for s in steps]).to(device)
            self.steps = list(copied.unbind())
            if not self.skipped:
                torch._foreach_add_(list(steps), 1.0)


def clock_of(device: torch.device, lr: Tensor, weight_decay: float, betas: Sequence[float],
             grad_scale: Tensor | None, found_inf: Tensor | None) -> tuple[Any, list[Tensor]]:
    """The scalars of an update, read on the device where they lie there; and what keeps them alive.

    Args:
        betas: of the moments, up to two.
    """
    owners: list[Tensor] = []

    def on_device(value: Tensor | None, dtype: torch.dtype) -> int:
        if value is None:
            return 0
        owners.append(value.detach().to(device=device, dtype=dtype).reshape(1))
        return owners[-1].data_ptr()

    first, second = (*betas, 0.0, 0.0)[:2]
    beside = lr.device == device
    clock = cuda_extension().UpdateClock(
        0.0 if beside else lr.item(), on_device(lr, torch.float64) if beside else 0, weight_decay,
        first, second, on_device(grad_scale, torch.float32), on_device(found_inf, torch.float32),
    )
    return clock, owners


def _placed(parts: Sequence[bytes], device: torch.device) -> tuple[list[int], Tensor]:
    """The address of each part in device memory, and the memory.

    Memory whose bytes were seen before on the same stream is used again. While a graph is captured
    each update has its own, which the graph keeps.
    """
    content = b"".join(parts)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, content)
    memory = None if capturing else _kept.pop(key, None)
    if memory is None:
        memory = torch.empty(len(content) // 8, dtype=torch.int64, device=device)
        source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        cuda_extension().upload(cuda_place(memory), source.data_ptr(), len(content),
                                memory.data_ptr())
    if not capturing:
        _kept[key] = memory
        if len(_kept) > _KEPT:
            del _kept[next(iter(_kept))]
    starts = itertools.accumulate(map(len, parts[:-1]), initial=0)
    return [memory.data_ptr() + start for start in starts], memory


def _first_runs(runs: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(runs) + 1}q", *itertools.accumulate(runs, initial=0))


def upload(rows: list[bytes], steps: Sequence[Tensor], runs: Sequence[int],
           device: torch.device, masters: Sequence[bytes]) -> tuple[tuple[int, ...], Tensor]:
    """A table of an update's tensors in device memory, and the addresses of its parts.

    Args:
        rows: a packed ``AdamWTensor`` or ``SgdTensor`` each.
        steps: of the same tensors.
        runs: their numbers of runs.
        masters: a packed ``MasterWeight`` each, or none.

    Returns:
        (tensors, steps, first_run, scalars, shared, masters, count, runs) as the kernels take them;
        and the memory.
    """
    count = len(rows)
    parts = [b"".join(rows), struct.pack(f"<{count}Q", *[s.data_ptr() for s in steps]),
             _first_runs(runs), bytes(8 * count), bytes(16), b"".join(masters)]
    addresses, memory = _placed(parts, device)
    if not masters:
        addresses[5] = 0
    return (*addresses, count, sum(runs)), memory


def upload_sgd(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Tensor],
               scales: Sequence[Tensor], steps: Sequence[Tensor], tensors: Sequence[int],
               offsets: Sequence[int], masters: Sequence[Tensor] | None,
               device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    """:func:`upload` of tensors with one moment each, or with none (empty ``moments``)."""
    rows, runs, extras = [], [], []
    for i, p in enumerate(params):
        moment, scale = (moments[i], scales[i]) if moments else (None, None)
        shape = matrix_of(p)
        rows.append(sgd_row(p, grads[i], moment, scale, shape, 0, tensors[i], offsets[i]))
        runs.append(runs_of(*shape, 0 if moment is None else STATE_TYPES[moment.dtype]))
        if masters:
            extras.append(struct.pack("<2q", *master_row(masters, i)))
    return upload(rows, steps, runs, device, extras)


def upload_sizes(rows: list[bytes], steps: Sequence[Tensor], sizes: Sequence[Sequence[int]],
                 device: torch.device, masters: Sequence[bytes],
                 ) -> tuple[list[int], list[int], Tensor]:
    """:func:`upload` of tensors that are taken in pieces of several kinds.

    Args:
        sizes: each tensor's number of pieces of every kind.

    Returns:
        the addresses of (tensors, steps, where each kind begins in each tensor, masters); the sum
        of each kind's pieces; and the memory.
    """
    kinds = list(zip(*sizes, strict=True))
    parts = [b"".join(rows), struct.pack(f"<{len(rows)}Q", *[s.data_ptr() for s in steps]),
             *map(_first_runs, kinds), b"".join(masters)]
    addresses, memory = _placed(parts, device)
    if not masters:
        addresses[-1] = 0
    return addresses, list(map(sum, kinds)), memory


def upload_runs(rows: list[bytes], runs: Sequence[int],
                device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    """A table of packed tensors that are taken in runs, whatever a run is.

    Returns:
        (tensors, first_run, count, runs) as the kernels take them; and the memory.
    """
    addresses, memory = _placed([b"".join(rows), _first_runs(runs)], device)
    return (*addresses, len(rows), sum(runs)), memory


def extension_for(params: Sequence[Tensor]) -> tuple[ModuleType, Any, torch.device]:
    """The module, the place and the device of an update."""
    return cuda_extension(), cuda_place(params[0]), params[0].device
