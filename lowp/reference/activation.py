"""Activations and derivatives in fp32: one IEEE operation at a time, so every backend can follow.

Measured against fp64 over all of fp32 (tests/test_activation.py): ``exp`` within 3 ulp where the
result is normal (0 below), the activations within 5e-6 of max(|y|, |x| 2^-24), the derivatives
within 4e-6 absolutely.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
_EXP = (0.0013813161, 0.0083694104, 0.041668456, 0.16666515, 0.49999994)
_ERFC = (-0.064701088, 0.24246506, -0.25542724, 0.27296478, -0.046637621, 0.10713308, 0.074265987,
         0.085341953, 0.084595084)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    q = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        q = q * x + c
    return q


def _reciprocal(x: Tensor) -> Tensor:
    return torch.ones_like(x) / x


def _power_of_two(n: Tensor) -> Tensor:
    return (n + 127 << 23).view(torch.float32)


def exp(x: Tensor) -> Tensor:
    """e^x (Cody and Waite, "Software manual for the elementary functions", 1980, chapter 6).

    +Inf above 88.72, 0 below -87.33; NaN stays NaN.
    """
    c = torch.where(x < -87.33, -87.33, x)
    c = torch.where(c > 88.72, 88.72, c)
    t = c * 1.44269504 + _MAGIC
    n = t - _MAGIC
    r = (c - n * 0.693359375) - n * -2.12194440e-4
    p = (_horner(r, _EXP) * (r * r) + r) + 1.0
    whole = t.view(torch.int32) - 0x4B400000
    half = whole >> 1
    y = p * _power_of_two(half) * _power_of_two(whole - half)
    y = torch.where(x > 88.72, torch.inf, y)
    return torch.where(x.isnan(), x, torch.where(x < -87.33, 0.0, y))


def _tanh_argument(x: Tensor) -> Tensor:
    return (x + x * x * x * 0.044715) * 1.59576912


def _gaussian(x: Tensor) -> Tensor:
    return exp(x * x * -0.5)


def _normal_cdf(x: Tensor, gaussian: Tensor) -> Tensor:
    """Phi(x) from exp(-x^2/2): erfc(t) = exp(-t^2) P(1 / (1 + 0.3 t)), P by Lawson's method."""
    s = _reciprocal(x.abs() * 0.707106781 * 0.3 + 1.0)
    tail = gaussian * (_horner(s, _ERFC) * s)
    return torch.where(x < 0, tail, 1.0 - tail)


def activate(z: Tensor, activation: str) -> Tensor:
    """``activation(z)``, fp32. At -Inf the smooth ones are -0, at +Inf +Inf.

    Every NaN becomes 0x7FC00000, since machines differ in which payload they pass on.
    """
    x = torch.where(z < -126.0, -126.0, z)
    if activation == "none":
        y = z
    elif activation == "relu":
        y = torch.where(z < 0, 0.0, z)
    elif activation == "gelu":
        y = x * _normal_cdf(x, _gaussian(x))
    else:
        y = x / (exp(-(x if activation == "silu" else _tanh_argument(x))) + 1.0)
    return torch.where(y.isnan(), torch.nan, y)


def derivative(z: Tensor, activation: str) -> Tensor:
    """d activation / dz at ``z``, fp32; relu's is 1 at NaN, so that no NaN is hidden."""
    if activation == "none":
        return torch.ones_like(z)
    if activation == "relu":
        return torch.where(z <= 0, 0.0, torch.ones_like(z))
    x = torch.where(z < -126.0, -126.0, z)
    x = torch.where(x > 126.0, 126.0, x)
    if activation == "gelu":
        gaussian = _gaussian(x)
        return _normal_cdf(x, gaussian) + x * (gaussian * 0.39894228)
    s = _reciprocal(exp(-(x if activation == "silu" else _tanh_argument(x))) + 1.0)
    if activation == "silu":
        return s * (x * (1.0 - s) + 1.0)
    slope = (x * x * 0.134145 + 1.0) * 1.59576912
    return s + x * (s * (1.0 - s)) * slope


def gradient(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """``dy * derivative(z)``, fp32, every NaN 0x7FC00000."""
    dz = dy * derivative(z, activation)
    return torch.where(dz.isnan(), torch.nan, dz)
