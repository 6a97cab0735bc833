"""Matrix products with fp32 sums, bias and activation in fp32, and one rounding, by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.reference.activation import activate, gradient
from lowp.reference.bias_grad import bias_grad
from lowp.reference.rounding import round_to


def finish(z: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
           preact_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """``act(z + bias)`` rounded once, and ``z + bias`` in ``preact_dtype`` (``None``: empty)."""
    if bias is not None:
        z = z + bias.float()
    y = round_to(activate(z, activation), out_dtype, "nearest")
    if preact_dtype is None:
        return y, z.new_empty(0)
    return y, round_to(activate(z, "none"), preact_dtype, "nearest")


def linear(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
           save_preact: bool) -> tuple[Tensor, Tensor]:
    """``act(x wᵀ + bias)`` of x [M, K], w [N, K], and the pre-activation in ``x``'s type."""
    z = x.float() @ w.float().t()
    y, preact = finish(z, bias, activation, out_dtype, x.dtype if save_preact else None)
    return y, preact.to(x.dtype)


def linear_dgrad(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str,
                 out_dtype: torch.dtype) -> Tensor:
    """``act'(preact) * (dy w)`` of dy [M, N], w [N, K], preact [M, K] (``None``: no factor)."""
    dx = dy.float() @ w.float()
    if preact is not None:
        dx = gradient(dx, preact.float(), activation)
    return round_to(dx, out_dtype, "nearest")


def linear_wgrad(dy: Tensor, x: Tensor, bias: bool,
                 out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``dyᵀ x`` of dy [M, N], x [M, K], and the column sums of dy in fp32."""
    dw = round_to(dy.float().t() @ x.float(), out_dtype, "nearest")
    return dw, bias_grad(dy) if bias else dy.new_empty(0, dtype=torch.float32)
