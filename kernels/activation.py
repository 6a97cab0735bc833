"""Activations and their derivatives in fp32, step by step as lowp/reference/activation.py."""

from __future__ import annotations

import triton
import triton.language as tl
from lowp.kernels.numerics import MAGIC, MAGIC_BITS, bits_float, canonical_nan, float_bits


@triton.jit
def exp_fp32(x):
    """e^x (Cody and Waite, "Software manual for the elementary functions", 1980, chapter 6)."""
    c = tl.where(x < -87.33, -87.33, x)
    c = tl.where(c > 88.72, 88.72, c)
    t = c * 1.44269504 + MAGIC
    n = t - MAGIC
    r = (c - n * 0.693359375) - n * -2.12194440e-4
    q = r * 0.0013813161 + 0.0083694104
    q = q * r + 0.041668456
    q = q * r + 0.16666515
    q = q * r + 0.49999994
    p = (q * (r * r) + r) + 1.0
    whole = t.to(tl.int32, bitcast=True) - MAGIC_BITS
    half = whole >> 1  # 2^n in two factors: n reaches 128, whose power alone is no fp32
    y = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    y = y * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x > 88.72, float("inf"), y)
    y = tl.where(x < -87.33, 0.0, y)
    return tl.where(x != x, x, y)


@triton.jit
def _reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _gaussian(x):
    return exp_fp32(-0.5 * (x * x))


@triton.jit
def _tanh_argument(x):
    return 1.59576912 * (x + 0.044715 * (x * x * x))


@triton.jit
def _normal_cdf(x, gaussian):
    t = bits_float(float_bits(x) & 0x7FFFFFFF) * 0.707106781
    s = _reciprocal(1.0 + 0.3 * t)
    q = s * -0.064701088 + 0.24246506
    q = q * s + -0.25542724
    q = q * s + 0.27296478
    q = q * s + -0.046637621
    q = q * s + 0.10713308
    q = q * s + 0.074265987
    q = q * s + 0.085341953
    q = q * s + 0.084595084
    tail = gaussian * (q * s)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """``ACTIVATION`` of fp32 ``z``; below -126 each equals its limit, so Inf * 0 never arises."""
    c = tl.where(z < -126.0, -126.0, z)
    if ACTIVATION == "relu":
        y = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        y = c * _normal_cdf(c, _gaussian(c))
    elif ACTIVATION == "gelu_tanh":
        y = tl.div_rn(c, 1.0 + exp_fp32(-_tanh_argument(c)))
    elif ACTIVATION == "silu":
        y = tl.div_rn(c, 1.0 + exp_fp32(-c))
    else:
        y = z
    return canonical_nan(y)


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr):
    """``dy`` times the derivative at ``z``; relu's is 1 at NaN, so that no NaN is hidden."""
    c = tl.where(z < -126.0, -126.0, z)
    c = tl.where(c > 126.0, 126.0, c)
    if ACTIVATION == "relu":
        d = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        g = _gaussian(c)
        d = _normal_cdf(c, g) + c * (g * 0.39894228)
    elif ACTIVATION == "gelu_tanh":
        s = _reciprocal(1.0 + exp_fp32(-_tanh_argument(c)))
        slope = 1.59576912 * (1.0 + 0.134145 * (c * c))
        d = s + c * (s * (1.0 - s)) * slope
    elif ACTIVATION == "silu":
        s = _reciprocal(1.0 + exp_fp32(-c))
        d = s * (1.0 + c * (1.0 - s))
    else:
        d = tl.full(z.shape, 1.0, tl.float32)
    return canonical_nan(dy * d)
