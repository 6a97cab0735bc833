"""AdamW on one tensor, by definition: fp32, one operation at a time, one rounding a store."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowp.reference.codec import decode, encode
from lowp.reference.philox import draws
from lowp.reference.rounding import round_to


class Noise(NamedTuple):
    """Which random bits a tensor's update draws."""

    seed: int
    step: int
    tensor: int
    offset: int

    def of(self, x: Tensor, role: int) -> Tensor:
        """One draw for each element of ``x``."""
        return draws(self.seed, self.step, self.tensor, role, x.numel(), self.offset).view(x.shape)


def fp32(x: float) -> float:
    """``x`` rounded once to fp32, as scalars reach the kernels."""
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


def no_nan_payload(x: Tensor) -> Tensor:
    """Every NaN becomes 0x7FC00000, since machines differ in which payload they pass on."""
    return torch.where(x.isnan(), torch.nan, x)


def sqrt(x: Tensor) -> Tensor:
    """The IEEE square root of fp32: torch's may be one ulp off (MKL), through fp64 it is exact."""
    return x.double().sqrt().float()


def store(x: Tensor, target: Tensor, rounding: str, noise: Noise, role: int) -> None:
    """Round ``x`` (fp32) into ``target``."""
    drawn = noise.of(x, role) if rounding == "stochastic" and target.dtype != x.dtype else None
    target.copy_(round_to(x, target.dtype, rounding, drawn))


def load_state(state: Tensor, scale: Tensor) -> Tensor:
    """fp32 values of a state: floats, or codes with their scales."""
    return state.float() if state.is_floating_point() else decode(state, scale)


def store_state(x: Tensor, state: Tensor, scale: Tensor, rounding: str, noise: Noise,
                role: int) -> None:
    """Round or encode ``x`` into a state."""
    if state.is_floating_point():
        store(x, state, rounding, noise, role)
        return
    drawn = noise.of(x, role) if rounding == "stochastic" else None
    codes, scales = encode(x, state.dtype == torch.int8, drawn)
    state.copy_(codes)
    scale.copy_(scales)


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
          rounding: str, state_rounding: str, noise: Noise) -> None:
    """Update everything in place (Loshchilov and Hutter, ICLR 2019, algorithm 2)."""
    step_size, inv_sqrt_bc2 = scalars(noise.step, lr, beta1, beta2)
    g = grad.float() * (-inv_scale if maximize else inv_scale)
    m = load_state(exp_avg, exp_avg_scale)
    v = load_state(exp_avg_sq, exp_avg_sq_scale)
    v = v if exp_avg_sq.is_floating_point() else v * v
    m = no_nan_payload(m + (g - m) * fp32(1 - beta1))
    v = no_nan_payload(v + (g * g - v) * fp32(1 - beta2))
    used = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.float(), v)
    denominator = sqrt(used) * inv_sqrt_bc2 + fp32(eps)
    p = param.float() * fp32(1 - lr * weight_decay) - m / denominator * step_size
    store(no_nan_payload(p), param, rounding, noise, 0)
    store_state(m, exp_avg, exp_avg_scale, state_rounding, noise, 1)
    root = v if exp_avg_sq.is_floating_point() else sqrt(v)
    store_state(root, exp_avg_sq, exp_avg_sq_scale, state_rounding, noise, 2)
    if max_exp_avg_sq is not None:
        store(used, max_exp_avg_sq, state_rounding, noise, 3)
