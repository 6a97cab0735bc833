"""linear_dgrad: the gradient of a linear layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.ops.library import Op, deferred, require_float_dtype
from lowp.ops.product import multiply, multiply_cuda, require_matrices
from lowp.reference import linear as reference

linear_dgrad = Op("linear_dgrad(Tensor dy, Tensor w, ScalarType out_dtype) -> Tensor")
"""``dx = dy w``: fp32 sums, one rounding to ``out_dtype``.

Args:
    dy: [M, N], fp32, bf16 or fp16; any strides.
    w: [N, K], of ``dy``'s type; any strides.
    out_dtype: fp32, bf16 or fp16.

Returns:
    dx [M, K]. Error: half an ulp of ``out_dtype`` and N 2^-24 Σ|dy||w|.

Raises:
    TypeError: types that are no floats or differ. ValueError: shapes that do not fit.
"""


@linear_dgrad.check
def _check(dy: Tensor, w: Tensor, out_dtype: torch.dtype) -> None:
    require_matrices("linear_dgrad", dy=dy, w=w)
    if dy.shape[1] != w.shape[0]:
        raise ValueError(
            f"lowp::linear_dgrad: expected dy [M, N] and w [N, K], got {tuple(dy.shape)} and "
            f"{tuple(w.shape)}"
        )
    require_float_dtype("linear_dgrad", "out_dtype", out_dtype)


@linear_dgrad.fake
def _fake(dy: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[0], w.shape[1]), dtype=out_dtype)


linear_dgrad.kernel("reference")(reference.linear_dgrad)


@linear_dgrad.kernel("cpu")
def _cpu(dy: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    return multiply(dy, w.t(), None, "none", out_dtype, False)[0]


@linear_dgrad.kernel("cuda")
def _cuda(dy: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    return multiply_cuda(dy, w.t(), None, "none", out_dtype, False)[0]


linear_dgrad.kernel("triton")(deferred("linear_dgrad"))
