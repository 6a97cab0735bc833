"""linear_wgrad on GPUs: one product; its first column of tiles also sums the bias gradient."""

from __future__ import annotations

import torch
from lowp.kernels.bias_grad import bias_grad
from lowp.kernels.product import Epilogue, product
from torch import Tensor


def linear_wgrad(dy: Tensor, x: Tensor, bias: bool,
                 out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op :data:`lowp.ops.linear_wgrad.linear_wgrad`."""
    dw = dy.new_empty((dy.shape[1], x.shape[1]), dtype=out_dtype)
    db = dy.new_empty(dy.shape[1] if bias else 0, dtype=torch.float32)
    # without columns there is no tile to sum it in; fp32's 16 rows at a time are too few for the
    # bound of the error
    apart = bias and (x.shape[1] == 0 or dy.dtype == torch.float32)
    product(dy.t(), x.t(), Epilogue(dw, row_sums=db if bias and not apart else None))
    return dw, bias_grad(dy) if apart else db
