"""linear_wgrad: the gradients of a linear layer's weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.ops.bias_grad import bias_grad
from lowp.ops.library import Op, deferred, require_float_dtype
from lowp.ops.product import multiply, multiply_cuda, require_matrices
from lowp.reference import linear as reference

linear_wgrad = Op(
    "linear_wgrad(Tensor dy, Tensor x, bool bias, ScalarType out_dtype) -> (Tensor dw, Tensor db)"
)
"""``dw = dyᵀ x`` and ``db = Σ_m dy[m]``: fp32 sums, one rounding of ``dw`` to ``out_dtype``.

Args:
    dy: [M, N], fp32, bf16 or fp16; any strides.
    x: [M, K], of ``dy``'s type; any strides.
    bias: whether to return ``db``.
    out_dtype: of ``dw``: fp32, bf16 or fp16.

Returns:
    dw [N, K]; db [N] in fp32, or an empty tensor [0]. Error of dw: half an ulp of ``out_dtype`` and
    M 2^-24 Σ|dy||x|; of db: as :data:`lowp.ops.bias_grad.bias_grad` says, with its bits too except
    on Triton, whose tiles have an order of their own.

Raises:
    TypeError: types that are no floats or differ. ValueError: shapes that do not fit.
"""


@linear_wgrad.check
def _check(dy: Tensor, x: Tensor, bias: bool, out_dtype: torch.dtype) -> None:
    require_matrices("linear_wgrad", dy=dy, x=x)
    if dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"lowp::linear_wgrad: expected dy [M, N] and x [M, K], got {tuple(dy.shape)} and "
            f"{tuple(x.shape)}"
        )
    require_float_dtype("linear_wgrad", "out_dtype", out_dtype)


@linear_wgrad.fake
def _fake(dy: Tensor, x: Tensor, bias: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dw = dy.new_empty((dy.shape[1], x.shape[1]), dtype=out_dtype)
    return dw, dy.new_empty(dy.shape[1] if bias else 0, dtype=torch.float32)


linear_wgrad.kernel("reference")(reference.linear_wgrad)


@linear_wgrad.kernel("cpu")
def _cpu(dy: Tensor, x: Tensor, bias: bool, out_dtype: torch.dtype,
         dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    dw = multiply(dy.t(), x.t(), None, "none", out_dtype, False, dtype=dtype)[0]
    return dw, bias_grad.kernels["cpu"](dy) if bias else dy.new_empty(0, dtype=torch.float32)


@linear_wgrad.kernel("cuda")
def _cuda(dy: Tensor, x: Tensor, bias: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    db = dy.new_empty(dy.shape[1] if bias else 0, dtype=torch.float32)
    dw = multiply_cuda(dy.t(), x.t(), None, "none", out_dtype, False,
                       row_sums=db if bias else None)[0]
    return dw, db


linear_wgrad.kernel("triton")(deferred("linear_wgrad"))
