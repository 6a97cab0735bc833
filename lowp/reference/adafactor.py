"""Adafactor on one tensor, by definition; sums in fp64 and of one order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowp.reference.square_sums import lane_sums, square_sum
from lowp.reference.stores import Noise, fp32, load_weight, no_nan_payload, sqrt, store_weight


def power_of(step: int, exponent: float) -> float:
    """step^exponent by IEEE operations of one order, so that every device has the same bits.

    It is 2^(exponent log2(step)), by the series of atanh and exp; the relative error is below 2^-46
    for steps up to 2^24 and exponents of magnitude up to 1.
    """
    mantissa, power = math.frexp(step)
    if mantissa < 0.70710678118654757:
        mantissa, power = mantissa * 2, power - 1
    s = (mantissa - 1) / (mantissa + 1)
    series = 0.0
    for n in range(21, 0, -2):
        series = series * (s * s) + 1.0 / n
    y = exponent * (power + s * series * 2.8853900817779268)  # 2 / ln 2
    whole = math.floor(y + 0.5)
    result, f = 1.0, (y - whole) * 0.69314718055994529  # ln 2
    for n in range(13, 0, -1):
        result = result * f / n + 1.0
    return math.ldexp(result, whole)


def scalars(step: int, lr: float, beta2_decay: float) -> tuple[float, float]:
    """(1 - beta2 at this step, the relative step size), fp64."""
    return power_of(step, beta2_decay), min(lr, 1.0 / math.sqrt(step))


def _moved(mean: Tensor, fresh: Tensor, weight: float) -> Tensor:
    return no_nan_payload(mean + (fresh.float() - mean) * fp32(weight))


def _factor(g: Tensor, row_var: Tensor, col_var: Tensor, weight: float, least: float) -> Tensor:
    """Moves both means of squares in place; the estimate of the second moment, like ``g``."""
    squares = g.double().square()
    row_var.copy_(_moved(row_var, lane_sums(squares).unsqueeze(-1) / g.shape[-1], weight))
    columns = torch.zeros_like(squares[..., 0, :])
    for row in squares.unbind(-2):
        columns = columns + row
    col_var.copy_(_moved(col_var, (columns / g.shape[-2]).unsqueeze(-2), weight))
    mean = (lane_sums(row_var.squeeze(-1).double()) / g.shape[-2]).float()
    mean = torch.where(mean < least, least, mean)
    return row_var * col_var / mean.unsqueeze(-1).unsqueeze(-1)


def adafactor(param: Tensor, grad: Tensor, row_var: Tensor, col_var: Tensor, variance: Tensor,
              master: Tensor | None, lr: float, beta2_decay: float, eps1: float, eps2: float,
              d: float, weight_decay: float, maximize: bool, inv_scale: float, rounding: str,
              noise: Noise) -> None:
    """Update everything in place (Shazeer and Stern, ICML 2018, algorithms 4 and 5)."""
    weight, rate = scalars(noise.step, lr, beta2_decay)
    p = load_weight(param, master)
    g = grad.float() * (-inv_scale if maximize else inv_scale)
    rms = math.sqrt(square_sum(p)) / math.sqrt(p.numel())
    alpha = (rms if rms > eps2 else eps2) * rate
    least = fp32(eps1)
    if g.dim() > 1:
        v = _factor(g, row_var, col_var, weight, least)
    else:
        v = no_nan_payload(variance + (g * g - variance) * fp32(weight))
        variance.copy_(v)
    smallest = fp32(least * least)
    u = g / sqrt(torch.where(v < smallest, smallest, v))
    cut = math.sqrt(square_sum(u)) / (math.sqrt(u.numel()) * d)
    step = fp32(alpha / (cut if cut > 1.0 else 1.0))
    moved = no_nan_payload(p * fp32(1 - lr * weight_decay) - u * step)
    store_weight(moved, param, master, rounding, noise)
