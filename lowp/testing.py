"""A statistical test of stochastic rounding that runs on any rounding function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FALSE_ALARM = 1e-6
"""Bound on the probability that :func:`assert_unbiased` rejects an unbiased rounding."""

_POINTS = 64


class _Grid(NamedTuple):
    """Values to round: ``x = sign (lower + fraction unit)``, with both neighbours in the target."""

    lower: Tensor  # |x| rounded toward zero, fp64 [64]
    unit: Tensor  # the distance to the neighbour above, fp64 [64]
    fraction: Tensor  # fp64 [64], multiples of 2^-16
    sign: Tensor  # fp64 [64]

    @property
    def x(self) -> Tensor:
        return (self.sign * (self.lower + self.fraction * self.unit)).float()


def _grid(dtype: torch.dtype) -> _Grid:
    """64 fractions over (0, 1) that use all of 16 bits, at many exponents, of both signs."""
    at = torch.arange(_POINTS, dtype=torch.float64)
    fraction = (1024 * at + 512 + 37 * (at % 14)) / 65536
    sign = 1 - 2 * (at // 2 % 2)
    if dtype == torch.int8:
        return _Grid(at * 29 % 126, torch.ones_like(at), fraction, sign)
    bits, lowest, span = (7, -126, 240) if dtype == torch.bfloat16 else (10, -14, 29)
    exponents = [lowest + 11 * i % span for i in range(_POINTS)]
    unit = torch.tensor([2.0 ** (e - bits) for e in exponents], dtype=torch.float64)
    significand = 2**bits + (at * 53) % 2**bits
    if dtype == torch.float16:  # 10 of 16 bits of fraction are left in fp32's 23
        fraction = (fraction * 8192).round() / 8192
    return _Grid(significand * unit, unit, fraction, sign)


def _tail(deviation: float, spread: float) -> float:
    """Bernstein's bound on the probability that a sum of independent variables in [0, 1] deviates
    from its mean by so much, either way; ``spread`` is its variance."""
    return 2 * math.exp(-(deviation**2) / (2 * (spread + deviation / 3)))


def _rounded(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = fn(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"lowp.testing.assert_unbiased: fn must return a tensor of shape {tuple(x.shape)}, "
            f"got {found}"
        )
    return y


def assert_unbiased(fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, *,
                    draws: int = 2**18) -> None:
    """Raise unless ``fn`` rounds stochastically without bias.

    A correct ``fn`` rounds x between neighbours a and b to b with probability (x - a) / (b - a),
    with new and independent random bits for each element. Checked on 64 values of both signs, many
    exponents and fractions spread over (0, 1), each rounded ``draws`` times:

    1. what the target represents, stays itself, every time;
    2. everything else becomes one of its two neighbours, every time;
    3. each value's share of rounding up (binomial; Bernstein's inequality);
    4. the shares of all values together, in magnitude and with their sign.

    **False alarms.** Checks 1 and 2 have none. 3 and 4 compare 66 counts with bounds that hold for
    any number of draws (Bernstein's inequality; Boucheron et al., "Concentration inequalities",
    2013, corollary 2.11), not with a normal approximation, and share :data:`FALSE_ALARM` equally:
    an unbiased ``fn`` fails with a probability below 1e-6. **Power.** With the default 2^18 draws
    check 4 finds a bias of 2^-10 of the spacing with a probability above 0.999 (its mean over all
    values then lies 9.8 standard deviations off, and the bound is reached at 6.1); one of 2^-11
    passes more often than not. 4 times the draws halve what is found.

    Fractions are multiples of 2^-16 (2^-13 for fp16), so a function that cuts the fraction to
    16 bits, as lowp's do for fp16 and int8, is unbiased on them.

    Args:
        fn: takes fp32 [n] and returns [n]; called twice, with up to 64 ``draws`` elements.
        dtype: the target: ``torch.bfloat16``, ``torch.float16`` or ``torch.int8`` (integers of
            magnitude at most 127); ``None``: the type that ``fn`` returns.
        draws: how often each value is rounded.

    Raises:
        AssertionError: it is biased, or no rounding; the message says where and by how much.
        TypeError: ``fn`` returns no tensor of the shape it got, or a type that is no target.
    """
    if dtype is None:
        dtype = _rounded(fn, torch.ones(1)).dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise TypeError(
            "lowp.testing.assert_unbiased: dtype must be torch.bfloat16, torch.float16 or "
            f"torch.int8, got {dtype}"
        )
    grid = _grid(dtype)
    _check_fixed_points(fn, grid, draws)
    _check_shares(_counts(fn, grid, draws), grid, draws)


def _check_fixed_points(fn: Callable[[Tensor], Tensor], grid: _Grid, draws: int) -> None:
    x = (grid.sign * grid.lower).float()
    repeated = x.repeat(draws)
    y = _rounded(fn, repeated).to(torch.float32)
    moved = (y != repeated).nonzero()
    if len(moved):
        at = int(moved[0])
        raise AssertionError(
            f"lowp.testing.assert_unbiased: {repeated[at].item()!r} is representable but became "
            f"{y[at].item()!r} ({len(moved)} of {len(repeated)} such roundings moved)"
        )


def _counts(fn: Callable[[Tensor], Tensor], grid: _Grid, draws: int) -> Tensor:
    """How often each value was rounded away from zero, fp64 [64]."""
    x = grid.x
    y = _rounded(fn, x.repeat(draws)).view(draws, _POINTS).to(torch.float32)
    lower = (grid.sign * grid.lower).float()
    upper = (grid.sign * (grid.lower + grid.unit)).float()
    is_up = y == upper
    strange = (~(is_up | (y == lower))).nonzero()
    if len(strange):
        row, i = strange[0].tolist()
        raise AssertionError(
            f"lowp.testing.assert_unbiased: {x[i].item()!r} became {y[row, i].item()!r}, which is "
            f"not one of its neighbours {lower[i].item()!r} and {upper[i].item()!r}"
        )
    return is_up.sum(0).double()


def _check_shares(up: Tensor, grid: _Grid, draws: int) -> None:
    p = grid.fraction
    alarm = FALSE_ALARM / (_POINTS + 2)
    excess = up - draws * p
    for i in range(_POINTS):
        chance = _tail(abs(excess[i].item()), draws * (p[i] * (1 - p[i])).item())
        if chance < alarm:
            raise AssertionError(
                f"lowp.testing.assert_unbiased: {grid.x[i].item()!r} was rounded away from zero in "
                f"{up[i].item() / draws:.6f} of {draws} draws, expected {p[i].item():.6f} "
                f"(probability of so much by chance below {chance:.1e})"
            )
    spread = draws * (p * (1 - p)).sum().item()
    for name, weight in (("away from zero", torch.ones_like(p)), ("upward", grid.sign)):
        deviation = (excess * weight).sum().item()
        chance = _tail(abs(deviation), spread)
        if chance < alarm:
            raise AssertionError(
                "lowp.testing.assert_unbiased: over all values the rounding is biased "
                f"{name} by {deviation / (draws * _POINTS):+.2e} of the spacing (probability of so "
                f"much by chance below {chance:.1e})"
            )
