"""AdamW on one tensor, by definition: fp32, one operation at a time, one rounding a store."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowp.reference.stores import (
    Noise,
    fp32,
    load_state,
    load_weight,
    no_nan_payload,
    sqrt,
    store,
    store_state,
    store_weight,
)


def power(base: float, n: int) -> float:
    """base^n in fp64 by squaring: IEEE products alone, so that every device has the same bits."""
    result = 1.0
    while n:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


def scalars(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, float]:
    """(lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)) in fp64, each rounded once to fp32.

    The power's error is below step 2^-52 of it, so that of 1 - beta^step is relatively below
    2^-51 / (1 - beta): under a quarter of an fp32 ulp for beta <= 1 - 2^-25.
    """
    return fp32(lr / (1.0 - power(beta1, step))), fp32(1.0 / math.sqrt(1.0 - power(beta2, step)))


def adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor,
          exp_avg_sq_scale: Tensor, max_exp_avg_sq: Tensor | None, lr: float, beta1: float,
          beta2: float, weight_decay: float, eps: float, maximize: bool, inv_scale: float,
          rounding: str, state_rounding: str, noise: Noise, coupled: bool,
          master: Tensor | None) -> None:
    """Update everything in place (Loshchilov and Hutter, ICLR 2019, algorithm 2)."""
    step_size, inv_sqrt_bc2 = scalars(noise.step, lr, beta1, beta2)
    weight = load_weight(param, master)
    g = grad.float() * (-inv_scale if maximize else inv_scale)
    if coupled and weight_decay != 0:
        g = g + weight * fp32(weight_decay)
    m = load_state(exp_avg, exp_avg_scale)
    v = load_state(exp_avg_sq, exp_avg_sq_scale)
    v = v if exp_avg_sq.is_floating_point() else v * v
    m = no_nan_payload(m + (g - m) * fp32(1 - beta1))
    v = no_nan_payload(v + (g * g - v) * fp32(1 - beta2))
    used = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.float(), v)
    denominator = sqrt(used) * inv_sqrt_bc2 + fp32(eps)
    decay = 1.0 if coupled else fp32(1 - lr * weight_decay)
    p = weight * decay - m / denominator * step_size
    store_weight(no_nan_payload(p), param, master, rounding, noise)
    store_state(m, exp_avg, exp_avg_scale, state_rounding, noise, 1)
    root = v if exp_avg_sq.is_floating_point() else sqrt(v)
    store_state(root, exp_avg_sq, exp_avg_sq_scale, state_rounding, noise, 2)
    if max_exp_avg_sq is not None:
        store(used, max_exp_avg_sq, state_rounding, noise, 3)
