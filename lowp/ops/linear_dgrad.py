"""linear_dgrad: the gradient of a linear layer's input, or before the activation it came from."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.ops.library import Op, deferred, require_choice, require_float_dtype
from lowp.ops.product import ACTIVATIONS, multiply, multiply_cuda, require_matrices
from lowp.reference import linear as reference

linear_dgrad = Op(
    "linear_dgrad(Tensor dy, Tensor w, Tensor? preact, str activation, ScalarType out_dtype) "
    "-> Tensor"
)
"""``dx = dy w``, or ``act'(preact) * (dy w)``: fp32 sums and factor, one rounding to ``out_dtype``.

The second is the gradient at ``preact`` where the layer's input was ``act(preact)``.

Args:
    dy: [M, N], fp32, bf16 or fp16; any strides.
    w: [N, K], of ``dy``'s type; any strides.
    preact: [M, K], of ``dy``'s type; any strides. ``None`` with, and only with, ``"none"``.
    activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"silu"``.
    out_dtype: fp32, bf16 or fp16.

Returns:
    dx [M, K]. Error of ``dy w``: half an ulp of ``out_dtype`` and N 2^-24 Σ|dy||w|. With an
    activation, of which the derivative is d: N 2^-24 Σ|dy||w| |d|, half an ulp of fp32 and half an
    ulp of ``out_dtype``; d itself is good to 4e-6, and every NaN result is the quiet one, as
    :data:`lowp.ops.activation_grad.activation_grad` says.

Raises:
    TypeError: types that are no floats or differ. ValueError: shapes that do not fit, an unknown
    activation, a ``preact`` without activation or an activation without ``preact``.
"""


@linear_dgrad.check
def _check(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str,
           out_dtype: torch.dtype) -> None:
    require_matrices("linear_dgrad", dy=dy, w=w)
    if dy.shape[1] != w.shape[0]:
        raise ValueError(
            f"lowp::linear_dgrad: expected dy [M, N] and w [N, K], got {tuple(dy.shape)} and "
            f"{tuple(w.shape)}"
        )
    require_choice("linear_dgrad", "activation", activation, ACTIVATIONS)
    if (preact is None) != (activation == "none"):
        raise ValueError(
            "lowp::linear_dgrad: preact must be None with activation 'none' and only then, got "
            f"{'None' if preact is None else 'a tensor'} with {activation!r}"
        )
    if preact is not None:
        require_matrices("linear_dgrad", dy=dy, preact=preact)
        if preact.shape != (dy.shape[0], w.shape[1]):
            raise ValueError(
                f"lowp::linear_dgrad: preact must have shape ({dy.shape[0]}, {w.shape[1]}), got "
                f"{tuple(preact.shape)}"
            )
    require_float_dtype("linear_dgrad", "out_dtype", out_dtype)


@linear_dgrad.fake
def _fake(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str,
          out_dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[0], w.shape[1]), dtype=out_dtype)


linear_dgrad.kernel("reference")(reference.linear_dgrad)


@linear_dgrad.kernel("cpu")
def _cpu(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str, out_dtype: torch.dtype,
         dtype: torch.dtype | None = None) -> Tensor:
    return multiply(dy, w.t(), None, activation, out_dtype, False, preact, dtype)[0]


@linear_dgrad.kernel("cuda")
def _cuda(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str,
          out_dtype: torch.dtype) -> Tensor:
    return multiply_cuda(dy, w.t(), None, activation, out_dtype, False, preact)[0]


linear_dgrad.kernel("triton")(deferred("linear_dgrad"))
