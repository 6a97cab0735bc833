"""quantize, quantize_row_col, dequantize: kernels equal the reference, it equals the contract."""

from __future__ import annotations

import math

import pytest
import torch

import lowp
from lowp.ops.dequantize import dequantize
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.reference.quantize import round_codes
from tests import cases
from tests.targets import CPU
from tests.tensors import FLOATS, strided_forms

GRANULARITIES = ("tensor", "row", "column", "block")
ROUNDINGS = ("nearest", "stochastic")
STEP = torch.tensor(3)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernel_equals_reference(isa, dtype, granularity, rounding):
    for op, args in cases.quantize_calls(dtype, granularity, rounding):
        cases.assert_bits(CPU, op, *args)
    args = (cases.special_matrix().to(dtype), rounding, 5, STEP, 9, 6, 7, 13)
    cases.assert_bits(CPU, quantize_row_col, *args)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_shapes_strides_and_threads(isa, threads, granularity, rounding):
    shapes = ((1, 1), (3, 7), (65, 129), (130, 1030), (2, 20000))
    for op, args in cases.quantize_shape_calls(granularity, rounding, shapes):
        cases.assert_bits(CPU, op, *args)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dequantize_every_code(isa, granularity, dtype):
    for op, args in cases.dequantize_calls(granularity, dtype):
        cases.assert_bits(CPU, op, *args)


@pytest.mark.parametrize("cols", (4096, 4100))
def test_outputs_larger_than_caches(isa, cols):
    """Stores around the caches, and rows that begin at any address, leave the bits of small ones.

    Matrices of fewer bytes than those stores begin at give what to compare with.
    """
    x = torch.randn(4200, cols).bfloat16()
    parts = [x[i : i + 2000].contiguous() for i in range(0, len(x), 2000)]
    for granularity in ("row", "block"):
        for rounding in ROUNDINGS:
            codes, scale = quantize(x, granularity, 100, rounding, 1, STEP, 2, 4, 8)
            small = [quantize(part, granularity, 100, rounding, 1, STEP, 2, 4, 8 + i * 2000 * cols)
                     for i, part in enumerate(parts)]
            assert torch.equal(codes, torch.cat([part for part, _ in small]))
            assert torch.equal(scale, torch.cat([part for _, part in small]))
    q, row_scale, turned, col_scale = quantize_row_col(x, "stochastic", 1, STEP, 2, 6, 7, 8)
    assert torch.equal(q, quantize(x, "row", 0, "stochastic", 1, STEP, 2, 6, 8)[0])
    assert torch.equal(turned.t(), quantize(x, "column", 0, "stochastic", 1, STEP, 2, 7, 8)[0])
    for dtype in FLOATS:
        for granularity, s in (("row", row_scale), ("column", col_scale)):
            y = dequantize(q, s, granularity, 0, dtype)
            assert torch.equal(y, (q * s).to(dtype))


def test_columns_of_codes_are_the_column_quantization_turned():
    x = torch.randn(33, 65)
    _, _, turned, scale = quantize_row_col(x, "stochastic", 1, STEP, 2, 6, 7, 8)
    codes, col_scale = quantize(x, "column", 0, "stochastic", 1, STEP, 2, 7, 8)
    assert torch.equal(turned, codes.t()) and torch.equal(scale, col_scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_error_is_at_most_half_a_scale(granularity):
    """|x - q s| <= s/2 exactly; fp32's three roundings of x·inv and q·s add 127·2^-22 of s."""
    x = torch.randn(50, 300) * torch.logspace(-20, 20, 50).unsqueeze(1)
    q = lowp.quantize(x, granularity, block=64)
    scale = q.scale.repeat_interleave(64, -1)[:, :300] if granularity == "block" else q.scale
    assert ((lowp.dequantize(q) - x).abs() <= scale * (0.5 + 127 * 2.0**-22)).all()


def test_tiny_zero_and_damaged_groups():
    x = torch.ones(5, 9)
    x[0] = 0
    x[1] = 2.0**-120
    x[2, 4] = math.inf
    x[3, 4] = math.nan
    q = lowp.quantize(x)
    assert q.scale[:2].eq(0).all() and q.scale[2:4].isnan().all() and q.scale[4] == 1 / 127
    assert q.codes[:4].eq(0).all() and q.codes[4].eq(127).all()
    assert lowp.dequantize(q)[2:4].isnan().all()


def test_stochastic_rounding_is_exact_over_all_draws():
    """Enumerated, not sampled: the 65536 draws of v = n + f round up floor(65536 f) times."""
    draws = torch.arange(65536)
    for v in (0.0, -0.25, 3.7, -126.999, 126.5, 127.0, 200.0, 2.0**-16, 2.0**-17):
        codes = round_codes(torch.full((65536,), v), draws).double()
        magnitude = min(abs(v), 127.0)
        fraction = math.floor((magnitude - math.floor(magnitude)) * 65536)
        assert codes.abs().sum().item() == math.floor(magnitude) * 65536 + fraction
        assert ((codes <= 0) if v < 0 else (codes >= 0)).all()


def test_stochastic_rounding_is_unbiased():
    """z test of round-ups at 64 fractions x 2^14 draws; |z| < 5.73 is 1e-6 over 100 comparisons."""
    n = 2**14
    fractions = (torch.arange(64) + 0.5) / 64
    x = (10 + fractions).unsqueeze(1).repeat(1, n)
    x[:, 0] = 127.0
    ups = quantize(x, "row", 0, "stochastic", 0, STEP, 0, 4, 0)[0][:, 1:].eq(11).sum(1)
    inv = torch.tensor(127.0) / 127.0
    p = ((x[:, 1] * inv - 10) * 65536).floor() / 65536
    z = (ups - (n - 1) * p) / ((n - 1) * p * (1 - p)).sqrt()
    assert z.abs().max() < 5.73


def test_relative_error_of_gaussian_rows():
    """0.0079 nearest and 0.0111 stochastic at K = 1024, +-10 %: the step over sqrt(12), or over
    sqrt(6), times E[amax] / 127 of 1024 normal values, 3.4."""
    x = torch.randn(512, 1024)
    for rounding, expected in (("nearest", 0.0079), ("stochastic", 0.0111)):
        error = (lowp.dequantize(lowp.quantize(x, rounding=rounding)) - x).norm() / x.norm()
        assert error == pytest.approx(expected, rel=0.1)


def test_a_shard_gets_the_codes_of_the_whole():
    x = torch.randn(8, 100)
    whole = lowp.quantize(x, rounding="stochastic", key=lowp.Key(1, 2, 3, 4))
    shard = lowp.quantize(x[3:], rounding="stochastic", key=lowp.Key(1, 2, 3, 4), offset=300)
    assert torch.equal(whole.codes[3:], shard.codes)


def test_gradient_passes_straight_through():
    x = torch.randn(4, 6, requires_grad=True)
    weights = torch.randn(4, 6)
    (lowp.dequantize(lowp.quantize(x)) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_torch_s_generator_is_not_touched():
    before = torch.get_rng_state()
    lowp.quantize(torch.ones(3, 3), rounding="stochastic")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity, dtype):
    for _, form in strided_forms(torch.randn(6, 10).to(dtype)):
        args = (form, granularity, 4, "stochastic", 1, STEP, 2, 4, 0)
        torch.library.opcheck(torch.ops.lowp.quantize.default, args)
        codes, scale = quantize(*args)
        torch.library.opcheck(
            torch.ops.lowp.dequantize.default, (codes, scale, granularity, 4, dtype)
        )
        args = (form, "nearest", 1, None, 2, 6, 7, 0)
        torch.library.opcheck(torch.ops.lowp.quantize_row_col.default, args)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(2, 2, dtype=torch.int32), "row"), TypeError, "x must be float32"),
        ((torch.ones(2, 2, dtype=torch.float64), "row"), TypeError, "float64"),
        ((torch.ones(2, 2), "rows"), ValueError, "granularity must be one of"),
        ((torch.ones(()), "row"), ValueError, "at least one dimension"),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        lowp.quantize(*arguments)
