"""The cases that every backend's kernels are held to; the families differ in sizes alone."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowp.ops.activation_grad import activation_grad
from lowp.ops.bias_grad import bias_grad
from lowp.ops.dequantize import dequantize
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.product import ACTIVATIONS
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import scaled_mm
from lowp.reference import activation as reference_activation
from lowp.reference.linear import finish
from lowp.reference.rounding import round_to
from tests.targets import REFERENCE, Target
from tests.tensors import FLOATS, random_bits, same_bits, special_values, strided_forms
from tests.tolerances import gradient_bound, product_bound

STEP = torch.tensor(3)
EDGES = (1, 3, 7, 8, 15, 16, 17, 33, 129)
Call = tuple[Any, tuple[Any, ...]]


def assert_bits(target: Target, op: Any, *args: Any) -> None:
    """The op gives the reference's bits."""
    got, want = target.run(op, *args), REFERENCE.run(op, *args)
    if isinstance(want, Tensor):
        got, want = (got,), (want,)
    for a, b in zip(got, want, strict=True):
        assert same_bits(a, b)


def special_matrix(rows: int = 400) -> Tensor:
    """Random patterns of every exponent, and each special value in a row of its own kind."""
    ordinary = torch.randn(max(rows, len(special_values())), 301)
    ordinary[3] = 0
    ordinary[4] = 1e-40
    ordinary[5] *= 1e-36
    ordinary[6] *= 3e37
    ordinary[7, :127] = torch.arange(127) + 0.5  # ties once the row's largest is 127
    ordinary[7, 127:] = 127.0
    special = special_values()
    mixed = special.unsqueeze(1) * torch.ones(1, 301)
    mixed[:, 1:] = ordinary[: len(special), 1:]
    bits = random_bits(20 * 301).view(20, 301)
    return torch.cat([ordinary[:rows], mixed, bits])


def quantize_calls(dtype: torch.dtype, granularity: str, rounding: str,
                   rows: int = 400) -> Iterator[Call]:
    """Every kind of value, with and without NaN or Inf in groups; draws in and out of step."""
    x = special_matrix(rows).to(dtype)
    for values in (x, x[:rows]):
        yield quantize, (values, granularity, 64, rounding, 5, STEP, 9, 4, 13)
    even = x[:rows, :288].contiguous()
    yield quantize, (even, granularity, 96, rounding, -7, None, 0xFEDCBA98, 7, 2**36 + 8)


def quantize_shape_calls(granularity: str, rounding: str,
                         shapes: tuple[tuple[int, int], ...]) -> Iterator[Call]:
    """Ragged shapes and strides, empty ones among them."""
    for rows, cols in shapes:
        for _, x in strided_forms(torch.randn(rows, cols)):
            yield quantize, (x, granularity, 100, rounding, 1, None, 2, 4, 0)
            yield quantize_row_col, (x, rounding, 1, None, 2, 6, 7, 5)


def dequantize_calls(granularity: str, dtype: torch.dtype) -> Iterator[Call]:
    """Every code under scales of every kind."""
    for cols in (256, 251):
        codes = torch.arange(-128, 128, dtype=torch.int8)[:cols].repeat(40, 1)
        shapes = {"tensor": (), "row": (40, 1), "column": (cols,), "block": (40, 3)}
        scale = random_bits(math.prod(shapes[granularity]), seed=3).abs().view(shapes[granularity])
        yield dequantize, (codes, scale, granularity, 100, dtype)


def activation_inputs(size: int) -> Tensor:
    """Every sign and exponent with many mantissas, a fine grid where functions bend, specials."""
    grid = torch.linspace(-20, 20, size + 1)
    return torch.cat([grid, random_bits(size), special_values()])


def activation_grad_calls(dtype: torch.dtype, activation: str, size: int) -> Iterator[Call]:
    """Gradients with special values among them, at pre-activations of every kind."""
    z = torch.cat([activation_inputs(size), torch.randn(size // 2 + 1) * 4]).to(dtype)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(z.shape, generator=generator).to(dtype)
    dy[::97] = special_values().to(dtype).repeat(z.numel() // 97 + 1)[: dy[::97].numel()]
    yield activation_grad, (dy, z, activation)
    for _, form in strided_forms(torch.randn(13, 48)):
        yield activation_grad, (form, torch.randn(form.shape).to(dtype), activation)


def bias_grad_inputs(dtype: torch.dtype) -> Iterator[Tensor]:
    """Ragged groups of rows, every exponent, special values, other strides."""
    yield torch.randn(300, 401).to(dtype)
    yield random_bits(129 * 500).view(129, 500).to(dtype)
    special = special_values()
    yield (special[:, None] * torch.ones(1, 40)).to(dtype)
    yield special[None].to(dtype)
    for _, form in strided_forms(torch.randn(65, 129)):
        yield form.to(dtype)


def assert_column_sums(got: Tensor, dy: Tensor) -> None:
    """The reference's bits but for NaN: which of several payloads a sum passes on is no part of
    IEEE."""
    want = REFERENCE.run(bias_grad, dy)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan) and same_bits(got[~nan], want[~nan])


def assert_bias_grad(target: Target, dy: Tensor) -> None:
    """Of the op by itself."""
    assert_column_sums(target.run(bias_grad, dy), dy)


def assert_bias_grad_of_wgrad(target: Target, dy: Tensor, db: Tensor) -> None:
    """Triton's order is its tiles', the others have bias_grad's."""
    if target.backend != "triton":
        return assert_column_sums(db, dy)
    assert_within(db[:, None], dy.t(), torch.ones(1, len(dy)))


def codes(*shape: int) -> Tensor:
    """int8 codes that a product may sum."""
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def edge_shapes(count: int | None = None) -> list[tuple[int, int, int]]:
    """All edge sizes cubed, or ``count`` of them drawn."""
    everything = list(itertools.product(EDGES, repeat=3))
    return everything if count is None else random.Random(0).sample(everything, count)


def scaled_mm_calls(activation: str, out: torch.dtype, cols: int = 300) -> Iterator[Call]:
    """Scales of every kind, every bias type, one scale or many."""
    a, b = codes(70, 90), codes(cols, 90)
    row_scale, col_scale = torch.rand(70, 1) * 1e-3, torch.rand(cols)
    row_scale[: len(special_values()), 0] = special_values().abs()
    for bias in (None, *[torch.randn(cols).to(dtype) for dtype in FLOATS]):
        yield scaled_mm, (a, b, row_scale, col_scale, bias, activation, out, True)
    yield scaled_mm, (a, b, row_scale[:1], col_scale[:1], None, activation, out, False)
    yield scaled_mm, (a, b, torch.tensor(0.25), torch.tensor(3e38), None, activation, out, False)


def strided_codes(x: Tensor) -> Tensor:
    """int8 codes of the strides of ``x``."""
    size = max(x.untyped_storage().nbytes() // x.element_size(), 1)
    return codes(size).as_strided(x.shape, x.stride(), x.storage_offset())


def scaled_mm_stride_calls(rows: int = 65, depth: int = 129) -> Iterator[Call]:
    """Other strides of either operand, and nothing to sum."""
    for _, a in strided_forms(torch.randn(rows, depth)):
        for _, b in strided_forms(torch.randn(40, max(a.shape[1], 1))):
            if b.shape[1] == a.shape[1]:
                rows, cols = torch.rand(a.shape[0]), torch.rand(b.shape[0])
                yield scaled_mm, (strided_codes(a), strided_codes(b), rows, cols, None, "none",
                                  torch.bfloat16, False)
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        yield scaled_mm, (codes(m, k), codes(n, k), torch.rand(m), torch.rand(n), torch.rand(n),
                          "gelu", torch.float16, True)


def matrices(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [m, k], w [n, k], dy [m, n] and a bias [n]."""
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    return tuple(t.to(dtype) for t in (x, w, dy, torch.randn(n)))


def assert_within(y: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """``y`` is ``a bᵀ + bias`` inside the derived bound."""
    exact = a.double() @ b.double().t()
    if bias is not None:
        exact = exact + bias.double()
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= product_bound(a, b, bias, y.dtype)).all()


def assert_gradient_within(dz: Tensor, dy: Tensor, w: Tensor, preact: Tensor,
                           activation: str) -> None:
    """``dz`` is ``act'(preact) * (dy w)`` inside the derived bound."""
    factor = reference_activation.derivative(preact.float().contiguous(), activation)
    exact = factor.double() * (dy.double() @ w.double())
    assert dz.shape == exact.shape
    assert ((dz.double() - exact).abs() <= gradient_bound(dy, w.t(), factor, dz.dtype)).all()


def assert_products(target: Target, m: int, n: int, k: int, dtype: torch.dtype,
                    out: torch.dtype) -> None:
    """linear and both its gradients inside the bound."""
    x, w, dy, bias = matrices(m, n, k, dtype)
    y, preact = target.run(linear, x, w, bias, "none", out, False)
    assert y.dtype == out and preact.shape == (0,)
    assert_within(y, x, w, bias)
    assert_within(target.run(linear, x, w, None, "none", out, False)[0], x, w)
    assert_within(target.run(linear_dgrad, dy, w, None, "none", out), dy, w.t())
    for activation in ("relu", "gelu"):
        dz = target.run(linear_dgrad, dy, w, x, activation, out)
        assert dz.dtype == out
        assert_gradient_within(dz, dy, w, x, activation)
    dw, db = target.run(linear_wgrad, dy, x, True, out)
    assert_within(dw, dy.t(), x.t())
    assert db.dtype == torch.float32
    assert_bias_grad_of_wgrad(target, dy, db)


def assert_epilogue(target: Target, dtype: torch.dtype, activation: str, cols: int = 300) -> None:
    """Integer operands: the sum is exact, so every bit after it belongs to the contract."""
    x = torch.randint(-3, 4, (70, 40)).to(dtype)
    w = torch.randint(-3, 4, (cols, 40)).to(dtype) / 8
    for bias_dtype in FLOATS:
        bias = torch.randn(cols).to(bias_dtype)
        z = x.float() @ w.float().t()
        for out in FLOATS:
            y, preact = target.run(linear, x, w, bias, activation, out, True)
            want = finish(z, bias, activation, out, dtype)
            assert same_bits(y, want[0]) and same_bits(preact, want[1])


def assert_dgrad_epilogue(target: Target, dtype: torch.dtype, activation: str,
                          cols: int = 300) -> None:
    """As :func:`assert_epilogue`, at pre-activations of every kind, those among them at which the
    logistic function is subnormal."""
    dy = torch.randint(-3, 4, (70, 40)).to(dtype)
    w = torch.randint(-3, 4, (40, cols)).to(dtype) / 8
    kinds = special_values(), -torch.linspace(86, 90, 200), activation_inputs(35 * cols)
    preact = torch.cat(kinds)[: 70 * cols].view(70, cols).to(dtype)
    dz = reference_activation.gradient(dy.float() @ w.float(), preact.float(), activation)
    for out in FLOATS:
        got = target.run(linear_dgrad, dy, w, preact, activation, out)
        assert same_bits(got, round_to(dz, out, "nearest"))


def assert_strides(target: Target, dtype: torch.dtype, rows: int = 65, depth: int = 129) -> None:
    """Products of tensors of other strides, and of empty ones."""
    for _, x in strided_forms(torch.randn(rows, depth).to(dtype)):
        for _, w in strided_forms(torch.randn(33, x.shape[1]).to(dtype)):
            if w.shape[1] == x.shape[1]:
                assert_within(target.run(linear, x, w, None, "none", dtype, False)[0], x, w)
                dy = torch.randn(w.shape[0], x.shape[0]).to(dtype).t()
                assert_within(target.run(linear_dgrad, dy, w, None, "none", dtype), dy, w.t())
                dz = target.run(linear_dgrad, dy, w, x, "silu", dtype)
                assert_gradient_within(dz, dy, w, x, "silu")
                assert_within(target.run(linear_wgrad, dy, x, False, dtype)[0], dy.t(), x.t())
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        x, w, dy, bias = matrices(m, n, k, dtype)
        y, preact = target.run(linear, x, w, bias, "none", dtype, True)
        assert torch.equal(y, bias.expand(m, n)) and preact.shape == (m, n)
        dw, db = target.run(linear_wgrad, dy, x, True, dtype)
        dx = target.run(linear_dgrad, dy, w, None, "none", dtype)
        assert dx.shape == (m, k) and dw.shape == (n, k)
        dz = target.run(linear_dgrad, dy, w, x, "gelu", dtype)
        assert dz.shape == (m, k) and not dz.any()
        assert not dw.any() or m > 0
        assert db.shape == (n,) and (m > 0 or not db.any())


def assert_ieee(target: Target, value: float) -> None:
    """NaN and Inf go where IEEE sends them, in the products and in what follows them."""
    for dtype in FLOATS:
        x, w, _, bias = matrices(20, 40, 50, dtype)
        x[3, 7] = value
        w[5, 9] = value
        y = target.run(linear, x, w, bias, "none", dtype, False)[0].float()
        want = torch.nn.functional.linear(x.float(), w.float(), bias.float())
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isposinf(), want.isposinf())
        assert torch.equal(y.isneginf(), want.isneginf())
        dy, preact = torch.randn(20, 40).to(dtype), torch.randn(20, 50).to(dtype)
        dy[2, 9] = preact[4, 6] = value
        dx = dy.float() @ w.float()
        for activation in ("relu", "gelu"):
            dz = target.run(linear_dgrad, dy, w, preact, activation, dtype).float()
            want = reference_activation.gradient(dx, preact.float(), activation)
            assert torch.equal(dz.isnan(), want.isnan())
            assert torch.equal(dz.isposinf(), want.isposinf())
            assert torch.equal(dz.isneginf(), want.isneginf())


ALL_ACTIVATIONS = tuple(ACTIVATIONS)
