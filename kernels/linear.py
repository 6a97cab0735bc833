"""linear on GPUs: one product with bias and activation in its epilogue."""

from __future__ import annotations

import torch
from lowp.kernels.product import Epilogue, product
from torch import Tensor


def linear(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
           save_preact: bool) -> tuple[Tensor, Tensor]:
    """The op :data:`lowp.ops.linear.linear`."""
    shape = (x.shape[0], w.shape[0])
    y = x.new_empty(shape, dtype=out_dtype)
    preact = x.new_empty(shape if save_preact else 0)
    bias = None if bias is None else bias.contiguous()
    product(x, w, Epilogue(y, preact if save_preact else None, bias, activation=activation))
    return y, preact
