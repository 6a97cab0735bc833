"""linear_dgrad on GPUs: one product."""

from __future__ import annotations

import torch
from lowp.kernels.product import Epilogue, product
from torch import Tensor


def linear_dgrad(dy: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The op :data:`lowp.ops.linear_dgrad.linear_dgrad`."""
    dx = dy.new_empty((dy.shape[0], w.shape[1]), dtype=out_dtype)
    product(dy, w.t(), Epilogue(dx))
    return dx
