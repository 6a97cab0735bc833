"""scaled_mm on GPUs: one int8 product with its scales, bias and activation in the epilogue."""

from __future__ import annotations

import torch
from lowp.kernels.product import Epilogue, product
from torch import Tensor


def scaled_mm(a: Tensor, b: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None,
              activation: str, out_dtype: torch.dtype,
              save_preact: bool) -> tuple[Tensor, Tensor]:
    """The op :data:`lowp.ops.scaled_mm.scaled_mm`."""
    shape = (a.shape[0], b.shape[0])
    y = a.new_empty(shape, dtype=out_dtype)
    preact = a.new_empty(shape if save_preact else 0, dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    product(a, b, Epilogue(y, preact if save_preact else None, bias, row_scale.contiguous(),
                           col_scale.contiguous(), activation=activation))
    return y, preact
