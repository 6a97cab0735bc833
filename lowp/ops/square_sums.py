"""square_sums: the sum of squares of each of many tensors, for norms of gradients."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowp.native import cpu_extension
from lowp.ops import update
from lowp.ops.library import FLOATS, Op
from lowp.reference import square_sums as reference

square_sums = Op("square_sums(Tensor[] xs) -> Tensor")
"""``Σ x²`` of each tensor, in fp64 and in one order, so that the bits do not depend on threads.

Elements are taken row-major in runs of 1024, each in 16 lanes (lowp.reference.square_sums). Squares
of fp32 are exact in fp64, and no sum overflows; the relative error of n elements is below
(n / 1024 + 68) 2^-53.

Args:
    xs: fp32, bf16 or fp16, any shapes and strides.

Returns:
    fp64 [len(xs)] on the CPU; NaN where an element is NaN, else Inf where one is infinite.

Raises:
    TypeError: a tensor that is sparse or of no float type.
"""


@square_sums.check
def _check(xs: Sequence[Tensor]) -> None:
    update.require_float_lists("square_sums", xs=xs)


@square_sums.fake
def _fake(xs: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(xs), dtype=torch.float64, device="cpu")


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
