"""linear_dgrad on GPUs: one product, with the gradient of an activation in its epilogue."""

from __future__ import annotations

import torch
from lowp.kernels.product import Epilogue, product
from torch import Tensor


def linear_dgrad(dy: Tensor, w: Tensor, preact: Tensor | None, activation: str,
                 out_dtype: torch.dtype) -> Tensor:
    """The op :data:`lowp.ops.linear_dgrad.linear_dgrad`."""
    dx = dy.new_empty((dy.shape[0], w.shape[1]), dtype=out_dtype)
    backward = preact is not None
    preact = None if preact is None else preact.contiguous()
    product(dy, w.t(), Epilogue(dx, preact, activation=activation, backward=backward))
    return dx
