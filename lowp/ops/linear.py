"""linear: matrix product, bias and activation with one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.ops.library import Op, deferred, require_choice, require_float_dtype
from lowp.ops.product import ACTIVATIONS, multiply, multiply_cuda, require_bias, require_matrices
from lowp.reference import linear as reference

linear = Op(
    "linear(Tensor x, Tensor w, Tensor? bias, str activation, ScalarType out_dtype, "
    "bool save_preact) -> (Tensor y, Tensor preact)"
)
"""``y = act(x wᵀ + bias)``: fp32 sums, bias and activation in fp32, one rounding to ``out_dtype``.

Args:
    x: [M, K], fp32, bf16 or fp16; any strides.
    w: [N, K], of ``x``'s type; any strides.
    bias: [N], any float type, or ``None``.
    activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"silu"``.
    out_dtype: fp32, bf16 or fp16.
    save_preact: whether to return ``x wᵀ + bias`` too.

Returns:
    y [M, N]; preact [M, N] in ``x``'s type, or an empty tensor [0].

Error of ``x wᵀ + bias`` against exact arithmetic: half an ulp of ``out_dtype`` and
(K + 1) 2^-24 (Σ|x||w| + |bias|). NaN and Inf go where IEEE sends them.

Raises:
    TypeError: types that are no floats or differ. ValueError: shapes that do not fit.
"""


@linear.check
def _check(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
           save_preact: bool) -> None:
    require_matrices("linear", x=x, w=w)
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"lowp::linear: expected x [M, K] and w [N, K], got {tuple(x.shape)} and "
            f"{tuple(w.shape)}"
        )
    require_bias("linear", bias, w.shape[0])
    require_choice("linear", "activation", activation, ACTIVATIONS)
    require_float_dtype("linear", "out_dtype", out_dtype)


@linear.fake
def _fake(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
          save_preact: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], w.shape[0])
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if save_preact else (0,))


linear.kernel("reference")(reference.linear)


@linear.kernel("cpu")
def _cpu(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
         save_preact: bool) -> tuple[Tensor, Tensor]:
    y, preact = multiply(x, w, bias, activation, out_dtype, save_preact)
    return y, x.new_empty(0) if preact is None else preact


@linear.kernel("cuda")
def _cuda(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
          save_preact: bool) -> tuple[Tensor, Tensor]:
    y, preact = multiply_cuda(x, w, bias, activation, out_dtype, save_preact)
    return y, x.new_empty(0) if preact is None else preact


linear.kernel("triton")(deferred("linear"))
