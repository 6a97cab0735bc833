"""activation_grad on GPUs: two reads, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lowp.kernels.activation import activation_gradient
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import to_nearest, widen
from torch import Tensor

TILE = 4096


@triton.jit(do_not_specialize=["n"])
def _activation_grad(dy, preact, dz, n: tl.int64, C: tl.constexpr, ACTIVATION: tl.constexpr,
                     EVEN: tl.constexpr):
    """C elements; EVEN: n is a multiple of 16."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    end = n // 16 * 16 if EVEN else n
    g = widen(tl.load(dy + at, mask=at < end, other=0.0))
    z = widen(tl.load(preact + at, mask=at < end, other=0.0))
    result = to_nearest(activation_gradient(g, z, ACTIVATION), dz.dtype.element_ty)
    tl.store(dz + at, result, mask=at < end)


def activation_grad(dy: Tensor, preact: Tensor, activation: str) -> Tensor:
    """The op :data:`lowp.ops.activation_grad.activation_grad`."""
    dy, preact = dy.contiguous(), preact.contiguous()
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    n = dy.numel()
    even = dy.dim() > 0 and dy.shape[-1] % 16 == 0
    launch(_activation_grad, (triton.cdiv(n, TILE),), dy, preact, dz, n, C=TILE,
           ACTIVATION=activation, EVEN=even, num_warps=8, **EXACT)
    return dz
