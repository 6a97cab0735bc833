"""Every bound that a test compares against, with the reason for it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

UNIT = 2.0**-24  # the relative error of one fp32 operation

_MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
_LOWEST_EXPONENT = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at the fp64 values ``x``."""
    exponent = torch.frexp(x.double())[1] - 1
    exponent = exponent.clamp_min(_LOWEST_EXPONENT[dtype])
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - _MANTISSA[dtype])


def _exact_and_sums(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``a bᵀ + bias`` in fp64, and the largest error of its fp32 sums.

    Any order of K products and a bias adds K + 1 roundings, each of at most 2^-24 of a partial sum,
    and no partial sum exceeds Σ|a||b| + |bias| (Higham, "Accuracy and stability of numerical
    algorithms", 2nd ed., section 3.1). 2^-126 a product is what kernels that flush subnormals lose.
    """
    depth = a.shape[1]
    magnitude = a.double().abs() @ b.double().abs().t()
    exact = a.double() @ b.double().t()
    if bias is not None:
        magnitude, exact = magnitude + bias.double().abs(), exact + bias.double()
    return exact, (depth + 1) * (1 + depth * UNIT) * UNIT * magnitude + depth * 2.0**-126


def product_bound(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Largest error of ``a bᵀ + bias`` (a [M, K], b [N, K]) with fp32 sums and one rounding."""
    exact, sums = _exact_and_sums(a, b, bias)
    return sums + 0.5 * ulp(exact.abs() + sums, out_dtype)


def gradient_bound(a: Tensor, b: Tensor, factor: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Largest error of ``factor * (a bᵀ)`` with fp32 sums, an fp32 product and one rounding.

    factor [M, N], fp32: the derivative as the contract defines it, bit for bit. It multiplies the
    error of the sums; their product is rounded to fp32, by half an ulp of its largest value, and
    the rounding of that to ``out_dtype`` adds half an ulp of what was rounded.
    """
    exact, sums = _exact_and_sums(a, b, None)
    scaled = sums * factor.double().abs()
    largest = (exact * factor.double()).abs() + scaled
    rounded = 0.5 * ulp(largest, torch.float32)
    return scaled + rounded + 0.5 * ulp(largest + rounded, out_dtype)


EXP_ULP = 3.0
"""Cody-Waite's two-part ln 2 leaves r good to 2^-25; polynomial, Horner and scaling add 4 roundings
of at most half an ulp, of which the last two weigh fully. Measured over all of fp32: 1.9."""

ACTIVATION = 5e-6
"""Of max(|y|, |x| 2^-24). Where y is above |x| 2^-24, the argument of exp is at most 17; the 5
roundings on the way to it (constants included) are an absolute error of 17 * 5 * 2^-24, which exp
makes relative."""

DERIVATIVE = 4e-6
"""Absolute: |x| (1 - s) s multiplies errors of s (2^-23) and of 1 - s by |x| <= 17, where s is not
yet 1."""

RECIPE_ERROR = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.2e-2, "int8": 2.0e-2, "int8_full": 2.0e-2}
"""Relative Frobenius error of one product by a recipe and of its two gradients on Gaussian data.
Float products: operands and result each lose half an ulp, sqrt(3) halves in all, twice for the
second product of a chain. int8: a row of 256 loses 0.70 % (nearest) or 0.98 % (stochastic), two
operands add in squares. tests/test_layer.py holds every layer to it."""


def chain_error(recipe: str, products: int) -> float:
    """Relative Frobenius error behind ``products`` products, one after the other.

    Each adds the error of its recipe to what it hands on. Rounding errors of different products are
    independent, so their squares add up; norms and residual sums hand on relative errors as is.
    """
    return float(RECIPE_ERROR[recipe] * products**0.5)


def orthogonalization_bound(iterates: list[Tensor],
                            coefficients: tuple[float, float, float]) -> float:
    """Largest Frobenius error of Newton-Schulz in bf16; ``iterates``: the exact ones, fp64, wide.

    A step x -> a x + (b x xᵀ + c (x xᵀ)²) x = U f(S) Vᵀ, f(s) = a s + b s³ + c s⁵, carries an error
    of the iterate on by at most the largest |f'| between 0 and the largest singular value (f is
    odd, so the divided differences of its singular values and of their negatives are means of f').
    It adds three roundings to bf16, each of 2^-8 of a norm (half an ulp is at most 2^-8 of the
    value): of x xᵀ, which (|b| + 2 |c| s²) s makes an error of the result, of the polynomial, and
    of the result. Terms of second order and the fp32 sums are below an eighth of that.
    """
    a, b, c = coefficients
    half_ulp = 2.0**-8
    error = half_ulp * iterates[0].norm().item()
    for x, y in itertools.pairwise(iterates):
        top = torch.linalg.matrix_norm(x, 2).item() + error
        s = torch.linspace(0, top, 1000, dtype=torch.float64)
        slope = (a + 3 * b * s**2 + 5 * c * s**4).abs().max().item()
        gram = x @ x.t()
        polynomial = b * gram + c * gram @ gram
        fresh = ((abs(b) + 2 * abs(c) * top**2) * top * gram.norm().item()
                 + polynomial.norm().item() * top + y.norm().item())
        error = 1.125 * (slope * error + half_ulp * fresh)
    return error
