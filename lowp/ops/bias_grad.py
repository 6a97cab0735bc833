"""bias_grad: the gradient of a linear layer's bias."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.library import FLOATS, Op, deferred, require_float
from lowp.reference import bias_grad as reference

bias_grad = Op("bias_grad(Tensor dy) -> Tensor")
"""``db[n] = Σ_m dy[m, n]``: the column sums in fp32.

Groups of 64 rows are summed one after the other, then the sums of the groups, so the bits depend on
nothing but ``dy``.

Args:
    dy: [M, N], fp32, bf16 or fp16; any strides.

Returns:
    db [N], fp32. Error: (64 + M / 64) 2^-24 Σ|dy|.

Raises:
    TypeError: ``dy`` is of no float type. ValueError: it is not a matrix.
"""


@bias_grad.check
def _check(dy: Tensor) -> None:
    require_float("bias_grad", "dy", dy)
    if dy.dim() != 2:
        raise ValueError(f"lowp::bias_grad: dy must be a matrix, got shape {tuple(dy.shape)}")


@bias_grad.fake
def _fake(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1], dtype=torch.float32)


bias_grad.kernel("reference")(reference.bias_grad)


@bias_grad.kernel("cpu")
def _cpu(dy: Tensor) -> Tensor:
    dy = dy.contiguous()
    db = dy.new_empty(dy.shape[1], dtype=torch.float32)
    cpu_extension().bias_grad(dy.data_ptr(), FLOATS[dy.dtype], *dy.shape, db.data_ptr(),
                              torch.get_num_threads())
    return db


@bias_grad.kernel("cuda")
def _cuda(dy: Tensor) -> Tensor:
    db = dy.new_empty(dy.shape[1], dtype=torch.float32)
    sum_columns_cuda(dy, db)
    return db


def sum_columns_cuda(dy: Tensor, db: Tensor) -> None:
    """Writes the sums of ``dy``'s columns into ``db``."""
    dy = dy.contiguous()
    rows, cols = dy.shape
    partial = dy.new_empty((-(-rows // 64), cols), dtype=torch.float32)
    cuda_extension().bias_grad(cuda_place(dy), dy.data_ptr(), FLOATS[dy.dtype], rows, cols,
                               db.data_ptr(), partial.data_ptr())


bias_grad.kernel("triton")(deferred("bias_grad"))
