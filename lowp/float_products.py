"""The three products of a linear layer where they are float, each in its recipe's precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowp.ops.bias_grad import bias_grad
from lowp.ops.library import runs_directly
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.product import cast, is_torchs, multiply
from lowp.recipe import DTYPES, Product


def _compute_dtype(product: Product, first: Tensor, second: Tensor) -> torch.dtype:
    """The type a float product takes its operands in: fp32 means as they come."""
    if product.precision != "fp32":
        return DTYPES[product.precision]
    return first.dtype if first.dtype == second.dtype else torch.float32


def output(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, product: Product,
           save_preact: bool) -> tuple[Tensor, Tensor | None]:
    """act(x wᵀ + bias) of x [M, K], w [N, K], in ``x``'s type; the pre-activation in the product's,
    ``None`` or empty unless saved."""
    dtype = _compute_dtype(product, x, w)
    if activation == "none" and is_torchs(x, w, bias, dtype):
        return nn.functional.linear(x, w, bias), None
    if runs_directly(x, w, bias):
        return multiply(x, w, bias, activation, x.dtype, save_preact, dtype=dtype)
    y, preact = linear(cast(x, dtype), cast(w, dtype), bias, activation, x.dtype, save_preact)
    return y, preact


def grad_input(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str, out: torch.dtype,
               product: Product) -> Tensor:
    """dx [M, K] = dy [M, N] w [N, K], times the derivative at ``preact`` [M, K] if given."""
    dtype = _compute_dtype(product, dy, w)
    if runs_directly(dy, w, preact):
        direct: Tensor = linear_dgrad.kernels["cpu"](dy, w, preact, activation, out, dtype)
        return direct
    dx: Tensor = linear_dgrad(cast(dy, dtype), cast(w, dtype), preact, activation, out)
    return dx


def grad_weight(dz: Tensor, x: Tensor, bias: bool, out: torch.dtype,
                product: Product) -> tuple[Tensor, Tensor]:
    """dw [N, K] = dzᵀ [N, M] x [M, K], and the bias gradient: the sum of dz as it comes."""
    dtype = _compute_dtype(product, dz, x)
    if runs_directly(dz, x):
        dw, db = linear_wgrad.kernels["cpu"](dz, x, bias, out, dtype)
        return dw, db
    exact = dz.dtype == dtype
    dw, db = linear_wgrad(cast(dz, dtype), cast(x, dtype), bias and exact, out)
    return dw, db if exact or not bias else bias_grad(dz)
