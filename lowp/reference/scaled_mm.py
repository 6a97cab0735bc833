"""The int8 product with its scales, by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.reference.linear import finish


def scaled_mm(a: Tensor, b: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None,
              activation: str, out_dtype: torch.dtype,
              save_preact: bool) -> tuple[Tensor, Tensor]:
    """``act((float(a bᵀ) * row_scale[m]) * col_scale[n] + bias)`` of a [M, K], b [N, K]."""
    sums = a.double() @ b.double().t()  # integers below 2^31: fp64 is exact
    sums = (sums + 0.0).to(torch.float32)  # an integer has no -0, which 0 * -1 is in fp64
    z = sums * row_scale.reshape(-1, 1) * col_scale.reshape(1, -1)
    y, preact = finish(z, bias, activation, out_dtype, out_dtype if save_preact else None)
    return y, preact.to(out_dtype)
