"""One fp32 value to one value of a 16-bit float type: to nearest, or stochastically."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {torch.bfloat16: (8, 7), torch.float16: (5, 10)}  # exponent bits, mantissa bits


def round_to(x: Tensor, dtype: torch.dtype, rounding: str, draws: Tensor | None = None) -> Tensor:
    """``x`` (fp32) in ``dtype``; ``draws`` as :func:`round_stochastic` takes them.

    ``dtype`` fp32 returns ``x``. Nearest: ties to even; a NaN becomes the quiet NaN of its sign.
    """
    if dtype == torch.float32:
        return x
    if rounding == "stochastic":
        assert draws is not None
        return round_stochastic(x, dtype, draws)
    quiet = 0x7FC0 if dtype == torch.bfloat16 else 0x7E00
    signed = torch.where(x.signbit(), quiet - 0x8000, quiet).to(torch.int16)
    return torch.where(x.isnan(), signed.view(dtype), x.to(dtype))


def round_stochastic(x: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Round |x| up in its last place iff (discarded fraction in 1/65536) + draw >= 65536.

    ``draws`` holds 0..65535, one an element. The fraction is cut to 16 bits, so the bias is below
    2^-16 unit, toward zero. Representable values are fixed points; a finite value saturates at the
    largest finite one; Inf stays, NaN becomes the quiet NaN of its sign.
    """
    exponent_bits, mantissa_bits = FORMATS[dtype]
    bias = (1 << (exponent_bits - 1)) - 1
    u = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    a = u & 0x7FFFFFFF
    e = (a >> 23).clamp_min(1)
    m = (a & 0x7FFFFF) | torch.where(a >= 1 << 23, 1 << 23, 0)  # |x| = m * 2^(e - 150)
    unit = (e - 127).clamp_min(1 - bias) - mantissa_bits  # exponent of the last place
    shift = (unit - (e - 150)).clamp_max(40)  # beyond 40 the 24-bit m is gone anyway
    discarded = m & ((1 << shift) - 1)
    frac16 = torch.where(shift > 16, discarded >> (shift - 16).clamp_min(0),
                         discarded << (16 - shift).clamp_min(0))
    q = (m >> shift) + ((frac16 + draws.view_as(a)) >> 16)
    code = ((e - 127 + bias).clamp_min(1) - 1 << mantissa_bits) + q
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    code = code.clamp_max(infinity - 1)
    code = torch.where(a >= 0x7F800000, infinity, code)
    code = torch.where(a > 0x7F800000, infinity | (1 << (mantissa_bits - 1)), code)
    code = code | (u >> 31 << 15)
    return torch.where(code >= 0x8000, code - 0x10000, code).to(torch.int16).view(dtype)
