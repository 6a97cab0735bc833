"""square_sums: the sum of squares of each of many tensors, for norms of gradients."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import device_table, update
from lowp.ops.library import FLOATS, Op, deferred
from lowp.reference import square_sums as reference

square_sums = Op("square_sums(Tensor[] xs) -> Tensor")
"""``Σ x²`` of each tensor, in fp64 and in one order, so that the bits do not depend on threads.

Elements are taken row-major in runs of 1024, each in 16 lanes (lowp.reference.square_sums). Squares
of fp32 are exact in fp64, and no sum overflows; the relative error of n elements is below
(n / 1024 + 68) 2^-53.

Args:
    xs: fp32, bf16 or fp16, any shapes and strides, on one device.

Returns:
    fp64 [len(xs)] on the device of ``xs``, so that nothing waits for it; NaN where an element is
    NaN, else Inf where one is infinite.

Raises:
    TypeError, ValueError: a tensor that is sparse or of no float type; tensors on two devices.
"""


@square_sums.check
def _check(xs: Sequence[Tensor]) -> None:
    update.require_float_lists("square_sums", xs=xs)
    for i, x in enumerate(xs):
        if x.device != xs[0].device:
            raise ValueError(
                f"lowp::square_sums: xs[{i}] must be on {xs[0].device} as xs[0], got {x.device}"
            )


@square_sums.fake
def _fake(xs: Sequence[Tensor]) -> Tensor:
    device = xs[0].device if xs else torch.device("cpu")
    return torch.empty(len(xs), dtype=torch.float64, device=device)


square_sums.kernel("reference")(reference.square_sums)


@square_sums.kernel("cpu")
def _cpu(xs: Sequence[Tensor]) -> Tensor:
    sums = torch.zeros(len(xs), dtype=torch.float64)
    work = [x.detach().contiguous() for x in xs]
    table = bytearray()
    for x in work:
        table += struct.pack("<3q", x.data_ptr(), x.numel(), FLOATS[x.dtype])
    if table:
        rows = torch.frombuffer(table, dtype=torch.int64)
        cpu_extension().square_sums(rows.data_ptr(), len(work), sums.data_ptr(),
                                    torch.get_num_threads())
    return sums


@square_sums.kernel("cuda")
def _cuda(xs: Sequence[Tensor]) -> Tensor:
    if not xs:
        return torch.zeros(0, dtype=torch.float64)
    extension, place, device = device_table.extension_for(xs)
    work = [x.detach().contiguous() for x in xs]
    sums = torch.empty(len(work), dtype=torch.float64, device=device)
    rows = [struct.pack("<3q", x.data_ptr(), x.numel(), FLOATS[x.dtype]) for x in work]
    runs = [-(-x.numel() // reference.RUN) for x in work]
    partial = sums.new_empty(sum(runs))
    table, _memory = device_table.upload_runs(rows, runs, device)
    extension.square_sums(place, extension.FloatTable(*table), partial.data_ptr(), sums.data_ptr())
    return sums


square_sums.kernel("triton")(deferred("square_sums"))
