"""The arithmetic of every kernel, as csrc/numerics/ has it: random bits, rounding, scales, codes.

Everything is fp32 after the load, since the interpreter's bf16 arithmetic is wrong, and roundings
are by integers, so that the interpreter and each GPU give the same bits. Kernels with these need
``enable_fp_fusion=False`` (kernels/launch.py: EXACT), for a fused a*b+c has other bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATE_BLOCK = tl.constexpr(256)  # elements that share a scale (csrc/numerics/codec.h)
ONE_BITS = tl.constexpr(0x3F800000)
INF_BITS = tl.constexpr(0x7F800000)
QUIET_NAN = tl.constexpr(0x7FC00000)
LEAST_SCALE = tl.constexpr(8 << 23)  # bits of 2^-119: below, a group has scale 0
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def divide_fp64(a, b):
    """IEEE division of fp64; of fp32 Triton's / is approximate, and div_rn the IEEE one."""
    return a / b


@triton.jit
def float_bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def bits_float(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """A loaded float as fp32; bf16 by its bits, for the interpreter has its subnormals wrong."""
    if x.dtype == tl.bfloat16:
        y = bits_float(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def magnitude_bits(x):
    """|x| as an int32, whose order is that of |x| with NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def canonical_nan(x):
    """Every NaN becomes the one of the contract: a GPU's own is 0x7FFFFFFF."""
    return tl.where(x != x, bits_float(tl.full(x.shape, QUIET_NAN, tl.uint32)), x)


@triton.jit
def philox(g, seed_low, seed_high, step, tensor, role: tl.constexpr):
    """The four output words of int64 groups ``g`` (Salmon et al., SC'11, section 3.3; 7 rounds).

    Written out, as ``tl.philox`` is another generator when a counter is 64 bits wide.
    """
    c0 = g.to(tl.uint32)
    c1 = ((g >> 32).to(tl.uint32) & 0xFFFF) | (role << 16)
    c2 = tl.zeros(g.shape, tl.uint32) + step
    c3 = tl.zeros(g.shape, tl.uint32) + tensor
    k0, k1 = seed_low, seed_high
    m0 = tl.full(g.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(g.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def draws(first, COLS: tl.constexpr, GROUPED: tl.constexpr, seed_low, seed_high, step, tensor,
          role: tl.constexpr):
    """16-bit draws [R, COLS] of the elements ``first`` [R] (int64) and those that follow each.

    GROUPED: every ``first`` is a multiple of 8, so one call serves eight elements in place.
    """
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    s, t = step.to(tl.uint32), tensor.to(tl.uint32)
    R: tl.constexpr = first.shape[0]
    if GROUPED:
        g = (first >> 3)[:, None] + tl.arange(0, COLS // 8)[None, :]
        w0, w1, w2, w3 = philox(g, k0, k1, s, t, role)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes: w0 w1, w2 w3
        drawn = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [R, COLS])
    else:
        e = first[:, None] + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = philox(e >> 3, k0, k1, s, t, role)
        lane = (e & 7).to(tl.int32)
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        drawn = tl.where((lane & 1) == 1, word >> 16, word & 0xFFFF)
    return drawn


@triton.jit
def bf16_code(x):
    """To nearest, ties to even; a NaN becomes the quiet NaN of its sign."""
    u = float_bits(x)
    a = u & 0x7FFFFFFF
    rounded = (a + 0x7FFF + ((a >> 16) & 1)) >> 16
    return ((u >> 16) & 0x8000) | tl.where(a > INF_BITS, 0x7FC0, rounded)


@triton.jit
def bf16_code_sr(x, draw):
    """Up in magnitude with the probability of the fraction; a finite value stays finite."""
    u = float_bits(x)
    a = u & 0x7FFFFFFF
    up = (a + draw) >> 16
    code = tl.where(up > 0x7F7F, 0x7F7F, up)
    code = tl.where(a >= INF_BITS, 0x7F80, code)
    return ((u >> 16) & 0x8000) | tl.where(a > INF_BITS, 0x7FC0, code)


@triton.jit
def fp16_code(x):
    """To nearest, ties to even; below 2^-14 the fp32 sum with 0.5 rounds at 2^-24."""
    u = float_bits(x)
    a = u & 0x7FFFFFFF
    rebased = a - (112 << 23)
    normal = (rebased + 0x0FFF + ((rebased >> 13) & 1)) >> 13
    tiny = float_bits(bits_float(a) + 0.5) - 0x3F000000
    code = tl.where(a < (113 << 23), tiny, normal)
    code = tl.where(a >= 0x477FF000, 0x7C00, code)  # 65520 and above overflow
    return ((u >> 16) & 0x8000) | tl.where(a > INF_BITS, 0x7E00, code)


@triton.jit
def fp16_code_sr(x, draw):
    """In units of the fp16 spacing at |x| (2^-24 below 2^-14); finite values saturate at 65504."""
    u = float_bits(x)
    a = u & 0x7FFFFFFF
    e = a >> 23
    normal = (a - (112 << 23) + (draw >> 3)) >> 13
    m = (a & 0x007FFFFF) | tl.where(e > 0, 0x00800000, 0)  # |x| = m 2^(e-150), m / 2^(126-e) units
    wide = 126 - tl.minimum(tl.maximum(e, 102), 112)
    lowest = tl.maximum(e, 1)
    below = tl.where(lowest < 102, 102 - lowest, 0)
    shifted = tl.where(below > 31, 0, m >> (below & 31))
    discarded = shifted & ((tl.full(a.shape, 1, tl.uint32) << wide) - 1)
    frac16 = tl.where(wide >= 16, discarded >> ((wide - 16) & 31), discarded << ((16 - wide) & 31))
    tiny = (shifted >> wide) + ((frac16 + draw) >> 16)
    code = tl.where(a < (113 << 23), tiny, normal)
    code = tl.where(code > 0x7BFF, 0x7BFF, code)
    code = tl.where(a >= INF_BITS, 0x7C00, code)
    return ((u >> 16) & 0x8000) | tl.where(a > INF_BITS, 0x7E00, code)


@triton.jit
def to_nearest(x, dtype: tl.constexpr):
    """fp32 ``x`` in ``dtype`` (fp32, bf16 or fp16), rounded to nearest."""
    if dtype == tl.bfloat16:
        y = bf16_code(x).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        y = fp16_code(x).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        y = x
    return y


@triton.jit
def to_stochastic(x, draw, dtype: tl.constexpr):
    """As :func:`to_nearest`, stochastically by ``draw`` (uint32, 0 .. 65535)."""
    if dtype == tl.bfloat16:
        y = bf16_code_sr(x, draw).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        y = fp16_code_sr(x, draw).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        y = x
    return y


@triton.jit
def int8_scale(amax):
    """(scale, inv_scale) of groups with the largest magnitude bits ``amax`` (int32)."""
    poisoned = amax >= INF_BITS
    empty = amax < LEAST_SCALE
    safe = tl.where(poisoned | empty, ONE_BITS, amax).to(tl.float32, bitcast=True)
    hundred27 = tl.full(amax.shape, 127.0, tl.float32)
    scale = tl.where(empty, 0.0, tl.div_rn(safe, hundred27))
    scale = tl.where(poisoned, bits_float(tl.full(amax.shape, QUIET_NAN, tl.uint32)), scale)
    return scale, tl.where(poisoned | empty, 0.0, tl.div_rn(hundred27, safe))


@triton.jit
def int8_code(v, draw, STOCHASTIC: tl.constexpr):
    """The code of v = x * inv_scale, which is no NaN; ``draw`` is used if STOCHASTIC."""
    if STOCHASTIC:
        m = tl.minimum(bits_float(float_bits(v) & 0x7FFFFFFF), 127.0)
        n = m.to(tl.int32)
        fraction = ((m - n.to(tl.float32)) * 65536.0).to(tl.int32)
        q = n + ((fraction + draw.to(tl.int32)) >> 16)
        code = tl.where(v < 0.0, -q, q)
    else:
        c = tl.minimum(tl.maximum(v, -127.0), 127.0)
        code = (c + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    return code.to(tl.int8)


@triton.jit
def state_scale(amax):
    """The scale of a block of state codes with the largest magnitude bits ``amax`` (int32)."""
    bits = tl.where(amax < LEAST_SCALE, 0, amax)
    return tl.where(amax >= INF_BITS, QUIET_NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _state_code(y, draw, TOP: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Code of the magnitudes y = |x| / scale in [0, 1] (csrc/numerics/codec.h)."""
    v = (TOP << 20) - (ONE_BITS - y.to(tl.int32, bitcast=True))
    # code 1 stands for 1.25 * 2^-16 (signed) or 1.25 * 2^-32: y in 65536ths of it
    parts = tl.minimum(y * (3435973836.8 if TOP == 127 else 225179981368524.8), 65535.0)
    if STOCHASTIC:
        r = draw.to(tl.int32)
        code = (v + (r << 4)) >> 20
        low = (parts.to(tl.int32) + r) >> 16
    else:
        code = (v + 0x80000) >> 20
        low = (parts.to(tl.int32) + 0x8000) >> 16
    return tl.minimum(tl.where(v < (1 << 20), low, code), TOP)


@triton.jit
def encode_state(x, scale, draw, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int8 or (``x`` >= 0) uint8 codes of ``x`` in blocks of ``scale``, of one shape."""
    usable = scale > 0.0
    y = tl.div_rn(bits_float(float_bits(x) & 0x7FFFFFFF), tl.where(usable, scale, 1.0))
    y = tl.where(usable, y, 0.0)
    if SIGNED:
        code = _state_code(y, draw, 127, STOCHASTIC)
        code = tl.where(x.to(tl.int32, bitcast=True) < 0, -code, code).to(tl.int8)
    else:
        code = _state_code(y, draw, 255, STOCHASTIC)
        code = tl.where((y > 0.0) & (code == 0), 1, code).to(tl.uint8)
    return code


@triton.jit
def decode_state(code, scale, SIGNED: tl.constexpr):
    """fp32 values of codes."""
    c = code.to(tl.int32)
    size = tl.where(c < 0, -c, c)
    top: tl.constexpr = 127 if SIGNED else 255
    bits = ONE_BITS - ((top - size) << 20)
    x = tl.where(size == 0, 0, bits).to(tl.float32, bitcast=True) * scale
    return tl.where(c < 0, -x, x)
