"""lowp.testing.assert_unbiased passes on every stochastic rounding of lowp and finds faults."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lowp
from lowp.ops.accumulate import accumulate
from lowp.ops.sgd import sgd
from lowp.reference.philox import draws
from lowp.reference.rounding import round_stochastic
from lowp.testing import FALSE_ALARM, _grid, _tail, assert_unbiased

EMPTY = torch.empty(0)


def by_update(dtype):
    """The rounding of a weight: 0 - 1 * (-x) in fp32, then one store."""
    def fn(x: Tensor) -> Tensor:
        p = torch.zeros(x.shape, dtype=dtype)
        sgd([p], [-x], [], [], [torch.zeros(())], torch.ones(()), 0.0, 0.0, 0.0, False, False,
            "stochastic", "stochastic", 3, [5], [0], None, None)
        return p

    return fn


def by_addition(dtype):
    def fn(x: Tensor) -> Tensor:
        total = torch.zeros(x.shape, dtype=dtype)
        accumulate([total], [x], "stochastic", 3, torch.tensor(1), 1, [5], [0])
        return total

    return fn


def codes(x: Tensor) -> Tensor:
    """int8 codes of a group whose amax of 127 makes the scale 1."""
    q = lowp.quantize(torch.cat([x, x.new_tensor([127.0])]), granularity="tensor",
                      rounding="stochastic", key=lowp.Key(step=1, tensor=9))
    return q.codes[:-1]


def users(change=lambda r, x: r):
    """What a user may write: random bits under the bf16 pattern, changed by a fault."""
    def fn(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(17)
        bits = torch.randint(0, 65536, x.shape, generator=generator, dtype=torch.int32)
        return (x.view(torch.int32) + change(bits, x) & -65536).view(torch.float32).bfloat16()

    return fn


OURS = {
    "weight bf16": by_update(torch.bfloat16), "weight fp16": by_update(torch.float16),
    "addition bf16": by_addition(torch.bfloat16), "addition fp16": by_addition(torch.float16),
    "int8 codes": codes,
}


@pytest.mark.parametrize("name", OURS)
def test_ours_is_unbiased(isa, name):
    assert_unbiased(OURS[name])


def test_the_definition_and_a_users_function_are_unbiased():
    assert_unbiased(lambda x: round_stochastic(x, torch.bfloat16, draws(7, 1, 2, 0, len(x))),
                    draws=2**14)
    assert_unbiased(users())


BIASED = "biased away from zero by|was rounded away from zero in 0"


@pytest.mark.parametrize("shift", (64, -64))
def test_a_bias_of_2_to_the_minus_10_is_found(shift):
    """Every value goes up 64 of 65536 draws too often, or too rarely."""
    with pytest.raises(AssertionError, match=BIASED):
        assert_unbiased(users(lambda r, x: (r + shift).clamp(0, 65535)))


def quiet(fn):
    """A fault that only values between two neighbours show."""
    return lambda x: torch.where(x.bfloat16().float() == x, x.bfloat16(), fn(x))


FAULTS = {
    "nearest": (lambda x: x.bfloat16(), "rounded away from zero in"),
    "8 bits of randomness": (users(lambda r, x: r & 0xFF00), r"biased away from zero|in 0\."),
    "one draw for all": (users(lambda r, x: r[:1].expand(len(r))), "rounded away from zero in"),
    "off by one": (users(lambda r, x: r + 1), "is representable but became"),
    "upward": (quiet(users(lambda r, x: (r + torch.where(x > 0, 64, -64)).clamp(0, 65535).int())),
               r"biased upward|in 0\."),
    "another grid": (quiet(lambda x: (x * 3).bfloat16()), "not one of its neighbours"),
    "NaN": (quiet(lambda x: torch.full_like(x, math.nan).bfloat16()), "became nan"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    fn, message = FAULTS[name]
    with pytest.raises(AssertionError, match=message):
        assert_unbiased(fn)


def test_bad_functions():
    with pytest.raises(TypeError, match=r"must return a tensor of shape \(1,\), got \(2,\)"):
        assert_unbiased(lambda x: torch.cat([x, x]))
    with pytest.raises(TypeError, match=r"must return a tensor of shape .* got float"):
        assert_unbiased(lambda x: 1.0)
    with pytest.raises(TypeError, match=r"dtype must be .* got torch.float32"):
        assert_unbiased(lambda x: x)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.int8))
def test_the_grid_is_exact(dtype):
    """Values, neighbours and fractions are what the test says they are."""
    grid = _grid(dtype)
    lower, upper = grid.sign * grid.lower, grid.sign * (grid.lower + grid.unit)
    assert ((grid.fraction > 0) & (grid.fraction < 1)).all()
    assert (grid.x.double() == lower + grid.fraction * (upper - lower)).all()
    assert len(grid.fraction.unique()) == 64 and {*grid.sign.tolist()} == {1.0, -1.0}
    for bound in (lower, upper):
        assert (bound.to(dtype).double() == bound).all()
    if dtype != torch.int8:
        integers = lower.to(dtype).view(torch.int16).long()
        assert (upper.to(dtype).view(torch.int16).long() - integers == 1).all()


def test_false_alarms_are_rarer_than_the_bound():
    """Bernstein's bound is above the exact binomial tail, summed term by term, everywhere."""
    for n, p in ((200, 0.5), (200, 0.03), (2000, 0.9)):
        pmf = [math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
                        + k * math.log(p) + (n - k) * math.log1p(-p)) for k in range(n + 1)]
        for deviation in (5.0, 20.0, 40.0):
            tail = sum(q for k, q in enumerate(pmf) if abs(k - n * p) >= deviation)
            assert tail <= _tail(deviation, n * p * (1 - p))
    assert FALSE_ALARM == 1e-6
