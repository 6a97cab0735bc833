"""linear, linear_dgrad, linear_wgrad: sums inside the derived bound, everything after exact."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.nn import functional

import lowp
from lowp.ops import product
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from tests import cases
from tests.cases import assert_gradient_within, assert_within, matrices
from tests.targets import CPU
from tests.tensors import FLOATS, same_bits

ACTIVATIONS = tuple(product.ACTIVATIONS)


@pytest.fixture(params=("chosen", "ours"))
def kernel(request, monkeypatch):
    """What the op chooses, and our kernel also where torch's is the faster one."""
    if request.param == "ours":
        monkeypatch.setattr(product, "_library_serves", lambda *_: False)
    return request.param


def shapes(count: int) -> list[tuple[int, int, int]]:
    rng = random.Random(0)
    some = [tuple(rng.choice(cases.EDGES) for _ in range(3)) for _ in range(count)]
    return [*some, *[tuple(rng.randint(1, 129) for _ in range(3)) for _ in range(count)]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_inside_the_bound(product_isa, kernel, dtype):
    large = [(300, 530, 700), (169, 257, 513), (950, 20, 1100), (1, 600, 300), (2, 3, 4000)]
    for m, n, k in [*shapes(25), *large]:
        for out in FLOATS:
            cases.assert_products(CPU, m, n, k, dtype, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows(product_isa, dtype):
    """Rows of w that are read where they lie: ragged, strided, at odd addresses, by threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for m, n, k in itertools.product((1, 3, 4, 5, 8, 9), (64, 67, 130), (64, 65, 127, 200)):
            x, w, _, bias = matrices(m, n, k + 3, dtype)
            x, w = x[:, 3:], w[:, 1 : k + 1]
            found.append(linear(x, w, bias, "none", torch.float32, False)[0])
            assert_within(found[-1], x, w, bias)
        x, w, _, bias = matrices(3, 1030, 1001, dtype)  # enough to be shared
        w[7, 1000], w[8, 3], x[1, 500] = math.inf, math.nan, -math.inf
        found.append(linear(x, w, bias, "none", torch.float32, False)[0])
        exact = x.double() @ w.double().t()
        assert torch.equal(found[-1].isnan(), exact.isnan())
        assert torch.equal(found[-1].isposinf(), exact.isposinf())
        assert torch.equal(found[-1].isneginf(), exact.isneginf())
    torch.set_num_threads(before)
    third = len(found) // 3
    for other in (found[third : 2 * third], found[2 * third :]):
        assert all(map(same_bits, found[:third], other))


def test_no_worse_than_torch(kernel):
    for dtype in FLOATS:
        x, w, _, _ = matrices(256, 256, 2048, dtype)
        exact = x.double() @ w.double().t()
        ours = (linear(x, w, None, "none", dtype, False)[0].double() - exact).square().mean()
        theirs = (functional.linear(x, w).double() - exact).square().mean()
        assert ours <= 1.2 * theirs  # rms errors are rounding noise; 1.2 is 3 sigma of their ratio


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_epilogue_is_exact(product_isa, kernel, dtype, activation):
    cases.assert_epilogue(CPU, dtype, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dgrad_epilogue_is_exact(product_isa, kernel, dtype, activation):
    cases.assert_dgrad_epilogue(CPU, dtype, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_that_go_past_the_caches(product_isa, dtype):
    """32 MB of fp32 or more are stored so, where rows are whole registers; their parts are not."""
    for n in (2048, 2050):
        x, w = torch.randn(4096, 8).to(dtype), torch.randn(n, 8).to(dtype)
        others = torch.randn(n), "relu", torch.float32, True
        parts = [linear(x[i : i + 1024], w, *others) for i in range(0, 4096, 1024)]
        for found, *pieces in zip(linear(x, w, *others), *parts, strict=True):
            assert same_bits(found, torch.cat(pieces)), n


def test_threads_do_not_change_bits(product_isa, kernel):
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        x, w, dy, bias = matrices(333, 290, 500, torch.float16)
        half = torch.float16
        results.append([*linear(x, w, bias, "gelu", half, True),
                        linear_dgrad(dy, w, None, "none", half),
                        linear_dgrad(dy, w, x, "gelu", half), *linear_wgrad(dy, x, True, half)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_empty(kernel, dtype):
    cases.assert_strides(CPU, dtype)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_nan_and_inf_go_where_ieee_sends_them(kernel, value):
    cases.assert_ieee(CPU, value)


def test_overflow_is_infinite():
    x = torch.full((1, 8), 200.0, dtype=torch.float16)
    y = linear(x, x, None, "none", torch.float16, False)[0]
    assert y.item() == math.inf  # 320,000 is beyond fp16
    assert linear(x, x, None, "none", torch.float32, False)[0].item() == 320_000


def test_errors():
    x, w, dy = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    cases = [
        (ValueError, r"linear: expected x \[M, K\] and w \[N, K\], got \(3, 4\) and \(4, 5\)",
         lambda: linear(x, w.t(), None, "none", torch.float32, False)),
        (TypeError, "x and w must be of one type, got torch.float32 and torch.float16",
         lambda: linear(x, w.half(), None, "none", torch.float32, False)),
        (TypeError, "x must be float32, bfloat16 or float16, got torch.int64",
         lambda: linear(x.long(), w, None, "none", torch.float32, False)),
        (ValueError, r"bias must have shape \(5,\), got \(4,\)",
         lambda: linear(x, w, torch.zeros(4), "none", torch.float32, False)),
        (ValueError, "activation must be one of none, relu, .*got 'tanh'",
         lambda: linear(x, w, None, "tanh", torch.float32, False)),
        (TypeError, "out_dtype must be float32, bfloat16 or float16, got torch.float64",
         lambda: linear(x, w, None, "none", torch.float64, False)),
        (ValueError, r"x must be a matrix, got shape \(4,\)",
         lambda: linear(x[0], w, None, "none", torch.float32, False)),
        (ValueError, r"linear_dgrad: expected dy \[M, N\] and w \[N, K\]",
         lambda: linear_dgrad(x, w, None, "none", torch.float32)),
        (ValueError, r"linear_dgrad: preact must be None .* got None with 'gelu'",
         lambda: linear_dgrad(dy, w, None, "gelu", torch.float32)),
        (ValueError, r"linear_dgrad: preact must be None .* got a tensor with 'none'",
         lambda: linear_dgrad(dy, w, x, "none", torch.float32)),
        (ValueError, r"linear_dgrad: preact must have shape \(3, 4\), got \(3, 5\)",
         lambda: linear_dgrad(dy, w, dy, "relu", torch.float32)),
        (TypeError, "linear_dgrad: dy and preact must be of one type, got .*32 and torch.bfloat16",
         lambda: linear_dgrad(dy, w, x.bfloat16(), "relu", torch.float32)),
        (ValueError, "linear_dgrad: activation must be one of none, relu, .*got 'tanh'",
         lambda: linear_dgrad(dy, w, x, "tanh", torch.float32)),
        (ValueError, r"linear_wgrad: expected dy \[M, N\] and x \[M, K\]",
         lambda: linear_wgrad(x, w, True, torch.float32)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    x, w, dy, bias = matrices(6, 5, 8, dtype)
    for a in (x, x[:0], torch.randn(8, 6).to(dtype).t(), torch.randn(12, 8).to(dtype)[::2]):
        for activation in ("none", "gelu"):
            torch.library.opcheck(torch.ops.lowp.linear.default,
                                  (a, w, bias, activation, dtype, activation != "none"))
        torch.library.opcheck(torch.ops.lowp.linear_wgrad.default,
                              (dy[: a.shape[0]], a, True, torch.float32))
    for preact, activation in ((None, "none"), (x, "gelu"), (x.t().contiguous().t(), "silu")):
        torch.library.opcheck(torch.ops.lowp.linear_dgrad.default,
                              (dy, w, preact, activation, dtype))


def test_reference_backend_agrees():
    x, w, dy, bias = matrices(9, 8, 7, torch.bfloat16)
    with lowp.backend("reference"):
        assert_within(linear(x, w, bias, "none", torch.bfloat16, False)[0], x, w, bias)
        assert_within(linear_dgrad(dy, w, None, "none", torch.bfloat16), dy, w.t())
        dz = linear_dgrad(dy, w, x, "gelu", torch.bfloat16)
        assert_gradient_within(dz, dy, w, x, "gelu")
        assert_within(linear_wgrad(dy, x, True, torch.bfloat16)[0], dy.t(), x.t())
