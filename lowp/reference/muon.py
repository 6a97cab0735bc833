"""Muon on one matrix, by definition: momentum, orthogonalization, step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowp.reference import linear
from lowp.reference.square_sums import square_sum
from lowp.reference.stores import (
    Noise,
    fp32,
    load_state,
    load_weight,
    no_nan_payload,
    store_state,
    store_weight,
)


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], eps: float,
                  steps: int) -> Tensor:
    """``x`` (fp32) with its singular values driven toward 1, bf16 (Jordan et al., "Muon", 2024)."""
    a, b, c = map(fp32, coefficients)
    norm = fp32(math.sqrt(square_sum(x)))
    z = (x / (eps if norm < eps else norm)).bfloat16()
    z = z.t() if x.shape[0] > x.shape[1] else z
    for _ in range(steps):
        gram = linear.linear(z, z, None, "none", torch.bfloat16, False)[0]
        square = linear.linear_dgrad(gram, gram, None, "none", torch.float32)
        polynomial = (gram.float() * b + square * c).bfloat16()
        higher = linear.linear_dgrad(polynomial, z, None, "none", torch.float32)
        z = (z.float() * a + higher).bfloat16()
    return z.t() if x.shape[0] > x.shape[1] else z


def momentum(grad: Tensor, momentum_buffer: Tensor, momentum_scale: Tensor, mu: float,
             nesterov: bool, maximize: bool, inv_scale: float, state_rounding: str,
             noise: Noise) -> Tensor:
    """Moves the buffer in place; the mean that is orthogonalized, fp32."""
    g = grad.float() * (-inv_scale if maximize else inv_scale)
    buf = load_state(momentum_buffer, momentum_scale)
    buf = no_nan_payload(buf + (g - buf) * fp32(1 - mu))
    store_state(buf, momentum_buffer, momentum_scale, state_rounding, noise, 1)
    return no_nan_payload(g + (buf - g) * fp32(mu)) if nesterov else buf


def step(param: Tensor, direction: Tensor, master: Tensor | None, lr: float, rate: float,
         weight_decay: float, rounding: str, noise: Noise) -> None:
    """Update the weight in place: decoupled decay by ``lr``, the step by ``rate``."""
    p = load_weight(param, master) * fp32(1 - lr * weight_decay)
    moved = no_nan_payload(p - direction.float() * fp32(rate))
    store_weight(moved, param, master, rounding, noise)
