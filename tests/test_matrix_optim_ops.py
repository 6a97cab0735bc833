"""adafactor and muon: kernels equal the reference bit for bit; the orthogonal factor is near."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import lowp
from lowp.ops.adafactor import adafactor
from lowp.ops.muon import ADJUSTMENTS, muon, orthogonalize
from lowp.reference.adafactor import power_of
from tests.targets import CPU, Target
from tests.tensors import FLOATS, random_bits, same_bits, special_values, strided_forms
from tests.tolerances import orthogonalization_bound
from tests.updates import EMPTY, assert_equal, cloned, masters_of, state_like

STATES = (*FLOATS, "int8")
COEFFICIENTS = [3.4445, -4.7750, 2.0315]


def adafactor_case(params, grads, rounding="stochastic", **options):
    torch.manual_seed(5)
    matrix = [p.dim() > 1 for p in params]
    return {
        "params": params, "grads": grads,
        "row_vars": [torch.rand(*p.shape[:-1], 1) if m else EMPTY
                     for p, m in zip(params, matrix, strict=True)],
        "col_vars": [torch.rand(*p.shape[:-2], 1, p.shape[-1]) if m else EMPTY
                     for p, m in zip(params, matrix, strict=True)],
        "variances": [EMPTY if m else torch.rand(p.shape)
                      for p, m in zip(params, matrix, strict=True)],
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "lr": torch.tensor(3e-2, dtype=torch.float64), "beta2_decay": -0.8,
        "eps1": torch.finfo(torch.float32).eps, "eps2": 1e-3, "d": 1.0, "weight_decay": 0.1,
        "maximize": False, "rounding": rounding, "seed": 11,
        "tensors": list(range(7, 7 + len(params))), "offsets": [13 * i for i in range(len(params))],
        "grad_scale": None, "found_inf": None, **options,
    }


def tiny_case():
    """Gradients on both sides of both floors, eps1 and its square, from states of 0."""
    shapes = ((20, 30), (6, 40), (1100,))
    spread = 10.0 ** -torch.arange(30)
    grads = [torch.randn(20, 30) * spread, torch.randn(6, 40) * 1e-5,
             torch.randn(1100) * spread.repeat(37)[:1100]]
    states = ("row_vars", "col_vars", "variances")
    case = adafactor_case([torch.randn(shape).bfloat16() for shape in shapes], grads)
    return {**case, **{key: [torch.zeros_like(v) for v in case[key]] for key in states}}


def muon_case(params, grads, kind=torch.float32, rounding="stochastic", ns_steps=0, **options):
    """Without Newton-Schulz steps, whose products have other bits on every backend."""
    torch.manual_seed(5)
    pairs = [state_like(p, kind, torch.int8) for p in params]
    return {
        "params": params, "grads": grads, "momentum_buffers": [m for m, _ in pairs],
        "momentum_scales": [s for _, s in pairs],
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "lr": torch.tensor(3e-2, dtype=torch.float64), "momentum": 0.95, "nesterov": True,
        "ns_coefficients": COEFFICIENTS, "eps": 1e-7, "ns_steps": ns_steps, "weight_decay": 0.1,
        "adjust_lr": "original", "maximize": False, "rounding": rounding,
        "state_rounding": rounding, "seed": 11, "tensors": list(range(7, 7 + len(params))),
        "offsets": [13 * i for i in range(len(params))], "grad_scale": None, "found_inf": None,
        **options,
    }


def scattered(rows: int, cols: int) -> torch.Tensor:
    """One number in each row and column at most, so that every sum of its products has one term:
    any order of summing has the same bits."""
    n = min(rows, cols)
    x = torch.zeros(rows, cols)
    x[torch.randperm(rows)[:n], torch.randperm(cols)[:n]] = torch.randn(n)
    return x


def exact_muon_case(shapes, dtype, kind, **options):
    """Newton-Schulz steps whose products are exact: gradients and momentum of one pattern."""
    grads = [scattered(*shape) for shape in shapes]
    case = muon_case([torch.randn(shape).to(dtype) for shape in shapes], grads, kind, ns_steps=5,
                     **options)
    for buffer, grad in zip(case["momentum_buffers"], grads, strict=True):
        buffer.mul_(grad != 0)
    return case


OPS = {"adafactor": (adafactor, adafactor_case), "muon": (muon, muon_case)}


@pytest.mark.parametrize("dtype", FLOATS)
def test_adafactor_equals_reference(isa, threads, dtype):
    shapes = [(57, 401), (3, 2, 5, 7), (1100,), (), (1, 2050), (2050, 1), (2, 300, 17), (0, 4)]
    params = [torch.randn(s).to(dtype) for s in shapes]
    for grad_type, rounding in zip(FLOATS, ("nearest", "stochastic", "stochastic"), strict=True):
        grads = [torch.randn(s).to(grad_type) for s in shapes]
        case = adafactor_case(params, grads, rounding, maximize=rounding == "nearest",
                              grad_scale=torch.tensor(3.0))
        assert_equal(adafactor, case)


def test_adafactor_of_tiny_gradients(isa):
    assert_equal(adafactor, tiny_case())


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_muon_equals_reference(isa, dtype, kind):
    shapes = [(57, 401), (401, 57), (1, 300), (0, 4)]
    params = [torch.randn(s).to(dtype) for s in shapes]
    grads = [torch.randn(s) for s in shapes]
    for nesterov, rounding in itertools.product((False, True), ("nearest", "stochastic")):
        adjust = "original" if nesterov else "match_rms_adamw"
        assert_equal(muon, muon_case(params, grads, kind, rounding, nesterov=nesterov,
                                     adjust_lr=adjust, maximize=nesterov,
                                     grad_scale=torch.tensor(3.0)))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_muon_of_exact_products_equals_reference(dtype, kind):
    for adjust in ADJUSTMENTS:
        shapes = [(20, 301), (64, 40), (0, 4), (33, 33)]
        assert_equal(muon, exact_muon_case(shapes, dtype, kind, adjust_lr=adjust))


@pytest.mark.parametrize("name", OPS)
def test_masters_and_special_values(isa, name):
    op, make = OPS[name]
    special = special_values()
    n = len(special)
    for dtype, master, rounding in itertools.product(
        FLOATS, ("remainder", "kahan"), ("nearest", "stochastic")
    ):
        params = [torch.randn(57, 401).to(dtype), special.repeat(n).view(n, n).to(dtype),
                  random_bits(3000, seed=3).view(30, 100).to(dtype)]
        grads = [torch.randn(57, 401), special.repeat_interleave(n).view(n, n),
                 random_bits(3000, seed=2).view(30, 100)]
        if name == "adafactor":
            params, grads = [*params, params[1].flatten()], [*grads, grads[1].flatten()]
        case = make(params, grads, rounding=rounding)
        assert_equal(op, {**case, "masters": masters_of(params, master)})


@pytest.mark.parametrize("name", OPS)
def test_found_inf_neighbours_and_strides(name):
    op, make = OPS[name]
    case = make([torch.randn(20, 30).bfloat16()], [torch.full((20, 30), torch.inf)],
                found_inf=torch.tensor(1.0), steps=[torch.tensor(3.0)])
    after = cloned(case)
    op(*after.values())
    for key, before in case.items():
        if isinstance(before, list) and before and isinstance(before[0], torch.Tensor):
            assert all(map(same_bits, after[key], before))
    full, empty = torch.randn(40, 50), torch.empty(0, 50)
    alone = assert_equal(op, make([full], [full]))
    for params in ([full, empty], [empty, full], [empty], []):
        after = assert_equal(op, make(list(params), [p.clone() for p in params]))
        assert [s.item() for s in after["steps"]] == [i + 1 for i in range(len(params))]
        if params and params[0] is full:
            assert same_bits(after["params"][0], alone["params"][0])
    for form, p in strided_forms(torch.randn(64, 129)):
        grads = [torch.ones(()).expand(p.shape)]
        if form == "expanded":
            with pytest.raises(ValueError, match=rf"{name}: params\[0\] is expanded"):
                op(*make([p], grads).values())
            continue
        late = {"steps": [torch.tensor(12_345.0)]}  # adafactor's rate falls from 10,000 on
        after = assert_equal(op, make([p.bfloat16()], grads, **late))
        plain = assert_equal(op, make([p.bfloat16().contiguous()], grads, **late))
        assert same_bits(after["params"][0].contiguous(), plain["params"][0])


def test_errors():
    p = [torch.randn(4, 5)]
    for name, (op, make) in OPS.items():
        for kind, message, change in (
            (ValueError, r"grads\[0\] must have shape \(4, 5\)", {"grads": [torch.randn(5, 4)]}),
            (TypeError, r"params\[0\] must be float32", {"params": [torch.ones(4, 5).long()]}),
            (ValueError, "rounding must be one of nearest, stochastic", {"rounding": "up"}),
            (ValueError, "steps must have 1 entries, one a parameter, got 0", {"steps": []}),
        ):
            with pytest.raises(kind, match=f"lowp::{name}: {message}"):
                op(*{**make(p, [torch.randn(4, 5)]), **change}.values())
    for op, case, message in (
        (adafactor, adafactor_case(p, p, row_vars=[torch.zeros(4)]),
         r"row_vars\[0\] must be contiguous float32 \(4, 1\), got torch.float32 \(4,\)"),
        (muon, muon_case(p, p, adjust_lr="up"), "adjust_lr must be one of original"),
        (muon, muon_case(p, p, ns_coefficients=[1.0]), "ns_coefficients must be 3 numbers, got 1"),
        (muon, muon_case([p[0][0]], [p[0][0]]), r"params\[0\] must be a matrix, got shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*case.values())


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    make = OPS[name][1]
    params = [torch.randn(3, 300).bfloat16(), torch.randn(0, 4), torch.randn(6, 4).t()]
    for masters in (None, masters_of(params, "kahan")):
        case = make(params, [torch.randn(p.shape) for p in params], masters=masters)
        torch.library.opcheck(getattr(torch.ops.lowp, name).default, tuple(case.values()))


def orthogonal(x: torch.Tensor, steps: int) -> torch.Tensor:
    """What the products make of one matrix."""
    xs = [x]
    orthogonalize(xs, COEFFICIENTS, 1e-7, steps)
    return xs[0]


@pytest.mark.parametrize("shape", ((40, 64), (64, 40), (1, 9), (130, 130)))
@pytest.mark.parametrize("steps", (0, 1, 5))
def test_orthogonalization_is_inside_its_bound(isa, shape, steps):
    assert_orthogonal(CPU, shape, steps)


def assert_orthogonal(target: Target, shape: tuple[int, int], steps: int) -> None:
    """Against fp64, in the Frobenius norm, and no worse than torch's, which rounds more often."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = torch.randn(shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
    exact = x.double() / x.double().norm()
    wide = exact.t() if shape[0] > shape[1] else exact
    a, b, c = COEFFICIENTS
    iterates = [wide]
    for _ in range(steps):
        gram = wide @ wide.t()
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
        iterates.append(wide)
    exact = wide.t() if shape[0] > shape[1] else wide
    with lowp.backend(target.backend):
        got = orthogonal(x.to(target.device), steps).cpu()
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    error = (got.double() - exact).norm().item()
    assert error <= orthogonalization_bound(iterates, (a, b, c))
    theirs = _zeropower_via_newtonschulz(x, (a, b, c), steps, 1e-7).double()
    # the errors are sums of thousands of roundings; a tenth is far beyond their luck
    assert error <= 1.1 * (theirs - exact).norm().item() + 2.0**-9 * exact.norm().item()
    if steps == 5 and shape == (130, 130):
        values = torch.linalg.svdvals(got.double())
        assert values.max() < 1.3 and values.median() > 0.6


def test_orthogonalization_of_zero_is_zero():
    assert (orthogonal(torch.zeros(4, 5), 5) == 0).all()
    assert math.isnan(orthogonal(torch.full((4, 5), math.nan), 1)[0, 0])


def test_power_of_is_inside_its_bound():
    """libm's pow is right within an ulp; ours has the same bits on every device."""
    for step in (*range(1, 300), 12_345, 2**20, 2**24 - 1, 2**24):
        for exponent in (-0.8, -0.5, -1.0, -0.123, 1.0):
            want = float(step) ** exponent
            assert abs(power_of(step, exponent) - want) <= 2.0**-46 * want
    assert power_of(1, -0.8) == 1.0 and power_of(2**10, -0.5) == 2.0**-5
