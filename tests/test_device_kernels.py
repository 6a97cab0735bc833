"""The device kernels, Triton and CUDA, over the CPU's cases: equal bits, products in the bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lowp.ops.accumulate import accumulate
from lowp.ops.adafactor import adafactor
from lowp.ops.adamw import adamw
from lowp.ops.lion import lion
from lowp.ops.muon import ADJUSTMENTS, muon
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import scaled_mm
from lowp.ops.sgd import sgd
from lowp.ops.square_sums import square_sums
from tests import cases, update_cases
from tests import test_matrix_optim_ops as matrix_optim
from tests.targets import REFERENCE, Target
from tests.tensors import FLOATS, random_bits, same_bits, special_values, strided_forms
from tests.updates import masters_of

GRANULARITIES = ("tensor", "row", "column", "block")
ROUNDINGS = ("nearest", "stochastic")
ONE = torch.ones(1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize(target: Target, dtype, granularity, rounding):
    rows = 12 if target.interpreted else 400
    for op, args in cases.quantize_calls(dtype, granularity, rounding, rows):
        cases.assert_bits(target, op, *args)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_row_col(target: Target, dtype, rounding):
    x = cases.special_matrix(12 if target.interpreted else 400).to(dtype)
    for values in (x, x[:, :288].contiguous(), x[:48, :256].contiguous()):
        cases.assert_bits(target, quantize_row_col, values, rounding, 5, cases.STEP, 9, 6, 7, 16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantize_shapes_and_strides(target: Target, granularity, rounding):
    shapes = ((3, 7), (17, 33)) if target.interpreted else ((1, 1), (3, 7), (65, 129), (130, 1030))
    for op, args in cases.quantize_shape_calls(granularity, rounding, shapes):
        cases.assert_bits(target, op, *args)


@pytest.mark.parametrize("granularity", ("row", "block"))
def test_quantize_rows_beyond_the_registers(target: Target, granularity):
    x = torch.randn(2, 20_000).bfloat16()
    x[1, 19_999] = 9.0
    cases.assert_bits(target, quantize, x, granularity, 17_000, "stochastic", 1, None, 2, 4, 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dequantize(target: Target, granularity, dtype):
    for op, args in cases.dequantize_calls(granularity, dtype):
        cases.assert_bits(target, op, *args)


@pytest.mark.parametrize("activation", cases.ALL_ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activation_grad(target: Target, dtype, activation):
    for op, args in cases.activation_grad_calls(dtype, activation, 20_000):
        cases.assert_bits(target, op, *args)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_grad(target: Target, dtype):
    for dy in cases.bias_grad_inputs(dtype):
        cases.assert_bias_grad(target, dy)


def test_int8_sums_are_exact(target: Target):
    pool = cases.codes(2, 129, 129)
    wide = pool.double()
    for m, n, k in cases.edge_shapes(60 if target.interpreted else None):
        args = (pool[0, :m, :k], pool[1, :n, :k], ONE, ONE, None, "none", torch.float32, False)
        y = target.run(scaled_mm, *args)[0]
        assert torch.equal(y.double(), wide[0, :m, :k] @ wide[1, :n, :k].t())


def test_the_largest_int8_sums(target: Target):
    a = torch.full((1, 133_144), 127, dtype=torch.int8)
    for b in (-a,) if target.interpreted else (a, -a):
        y = target.run(scaled_mm, a, b, ONE, ONE, None, "none", torch.float32, False)[0]
        assert y.item() == torch.tensor(127.0 * b[0, 0].item() * 133_144).item()


@pytest.mark.parametrize("activation", cases.ALL_ACTIVATIONS)
def test_scaled_mm(target: Target, activation):
    for out in FLOATS:
        for op, args in cases.scaled_mm_calls(activation, out, 40 if target.interpreted else 300):
            cases.assert_bits(target, op, *args)


def test_scaled_mm_strides(target: Target):
    sizes = (7, 20) if target.interpreted else (65, 129)
    for op, args in cases.scaled_mm_stride_calls(*sizes):
        cases.assert_bits(target, op, *args)


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_inside_the_bound(target: Target, dtype):
    count = (3 if dtype == torch.float32 else 12) if target.interpreted else None
    shapes = [*cases.edge_shapes(count), (65, 200, 136), (2, 3, 1000)]
    for i, (m, n, k) in enumerate(shapes):
        cases.assert_products(target, m, n, k, dtype, FLOATS[i % 3])


@pytest.mark.parametrize("activation", cases.ALL_ACTIVATIONS)
def test_linear_epilogue(target: Target, activation):
    for dtype in (torch.bfloat16, torch.float16) if target.interpreted else FLOATS:
        cases.assert_epilogue(target, dtype, activation, 40 if target.interpreted else 300)


@pytest.mark.parametrize("activation", cases.ALL_ACTIVATIONS[1:])
def test_linear_dgrad_epilogue(target: Target, activation):
    for dtype in FLOATS:
        cases.assert_dgrad_epilogue(target, dtype, activation, 40 if target.interpreted else 304)


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_strides_and_empty(target: Target, dtype):
    cases.assert_strides(target, dtype, *((7, 20) if target.interpreted else (65, 129)))


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_nan_and_inf_go_where_ieee_sends_them(target: Target, value):
    cases.assert_ieee(target, value)


@pytest.mark.parametrize("kind", update_cases.STATES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", update_cases.OPS)
def test_updates(target: Target, name, dtype, kind):
    op, make = update_cases.OPS[name]
    rows = 6 if target.interpreted else 257
    shapes = ((rows, 401), (5,), (), (rows, 272))
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    grads = [torch.randn(p.shape) for p in params]
    for rounding in ROUNDINGS:
        case = make(params, grads, kind, rounding, offsets=[0, 3, 0, 16])
        update_cases.assert_equal(target, op, case)


@pytest.mark.parametrize("kind", update_cases.STATES)
@pytest.mark.parametrize("name", update_cases.OPS)
def test_updates_of_special_values(target: Target, name, kind):
    op, make = update_cases.OPS[name]
    special = special_values()
    for dtype in FLOATS:
        grads = [special.repeat_interleave(len(special)), random_bits(3000, seed=2).view(30, 100)]
        params = [special.repeat(len(special)).to(dtype),
                  random_bits(3000, seed=3).view(30, 100).to(dtype)]
        update_cases.assert_equal(target, op, make(params, grads, kind))


@pytest.mark.parametrize("kind", update_cases.STATES)
def test_options_of_updates(target: Target, kind):
    params = [torch.randn(9, 300).bfloat16(), torch.randn(700)]
    grads = [torch.randn(9, 300).half(), torch.randn(700).bfloat16()]
    scaler = {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)}
    for amsgrad, maximize in ((True, False), (False, True)):
        case = update_cases.adamw_case(params, grads, kind, amsgrad=amsgrad, maximize=maximize,
                                       **scaler)
        update_cases.assert_equal(target, adamw, case)
    update_cases.assert_equal(target, sgd, update_cases.sgd_case(
        params, grads, kind, nesterov=True, dampening=0.0, **scaler))
    update_cases.assert_equal(target, sgd, update_cases.sgd_case(
        params, grads, kind, momentum_buffers=[], momentum_scales=[], weight_decay=0.0))
    update_cases.assert_equal(target, lion, update_cases.lion_case(
        params, grads, kind, maximize=True, weight_decay=0.0, **scaler))


@pytest.mark.parametrize("kind", update_cases.STATES)
def test_adam_with_coupled_decay(target: Target, kind):
    params = [torch.randn(9, 300).bfloat16(), torch.randn(700)]
    grads = [torch.randn(9, 300).half(), torch.randn(700).bfloat16()]
    for maximize, weight_decay in ((False, 0.1), (True, 0.1), (False, 0.0)):
        case = update_cases.adamw_case(params, grads, kind, maximize=maximize,
                                       weight_decay=weight_decay)
        plain = update_cases.run(target, adamw, case)
        after = update_cases.assert_equal(target, adamw, {**case, "coupled": True})
        same = all(map(same_bits, plain["params"], after["params"]))
        assert same == (weight_decay == 0)


@pytest.mark.parametrize("kind", ("remainder", "kahan"))
@pytest.mark.parametrize("name", update_cases.OPS)
def test_masters(target: Target, name, kind):
    op, make = update_cases.OPS[name]
    special = special_values()
    values = [torch.randn(6 if target.interpreted else 57, 401), torch.randn(()),
              torch.empty(0, 3), special.repeat(len(special)), random_bits(3000, seed=3),
              torch.randn(4, 272)]
    grads = [torch.randn(p.shape) for p in values]
    grads[3:5] = special.repeat_interleave(len(special)), random_bits(3000, seed=2)
    for dtype, rounding in itertools.product(FLOATS, ROUNDINGS):
        params = [p.to(dtype) for p in values]
        states = "int8" if rounding == "stochastic" else dtype
        case = make(params, grads, states, rounding, offsets=[0, 3, 0, 5, 8, 16])
        if name == "adamw":
            case["coupled"] = dtype == torch.bfloat16
        update_cases.assert_equal(target, op, {**case, "masters": masters_of(params, kind)})


@pytest.mark.parametrize("name", update_cases.OPS)
def test_a_step_of_0_keeps_every_remainder(target: Target, name):
    case = update_cases.still_case(name)
    after = update_cases.assert_equal(target, update_cases.OPS[name][0], case)
    assert all(same_bits(after[key][0], case[key][0]) for key in ("params", "masters"))


@pytest.mark.parametrize("kind", (None, "remainder", "kahan"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_adafactor(target: Target, dtype, kind):
    """Vectors, matrices and batches of them, with whole vectors and without, and empty ones."""
    special = special_values()
    n = len(special)
    rows = 3 if target.interpreted else 57
    shapes = [(rows, 401), (2, 2, 5, 32), (1100,), (), (1, 1050), (40, 1), (0, 4), (2, rows, 272)]
    values = [*map(torch.randn, shapes), special.repeat(n).view(n, n), random_bits(600)]
    params = [p.to(dtype) for p in values]
    grads = [*map(torch.randn, shapes), special.repeat_interleave(n).view(n, n),
             random_bits(600, seed=2)]
    nearest = kind == "remainder"
    case = matrix_optim.adafactor_case(params, [g.bfloat16() if nearest else g for g in grads],
                          ROUNDINGS[not nearest], maximize=nearest, grad_scale=torch.tensor(3.0),
                          offsets=[0, 16, 0, 5, 8, 3, 0, 24, 0, 0])
    case["masters"] = None if kind is None else masters_of(params, kind)
    update_cases.assert_equal(target, adafactor, case)


def test_adafactor_in_other_ways(target: Target):
    update_cases.assert_equal(target, adafactor, matrix_optim.tiny_case())
    params, grads = [torch.randn(20, 30).bfloat16()], [torch.full((20, 30), torch.inf)]
    case = matrix_optim.adafactor_case(params, grads, found_inf=torch.tensor(1.0))
    after = update_cases.run(target, adafactor, case)
    for key in ("params", "row_vars", "col_vars", "steps"):
        assert all(map(same_bits, after[key], case[key]))
    update_cases.assert_equal(target, adafactor, matrix_optim.adafactor_case([], []))
    for form, p in strided_forms(torch.randn(16, 33)):
        if form != "expanded":
            case = matrix_optim.adafactor_case([p.bfloat16()], [torch.ones(()).expand(p.shape)],
                                  steps=[torch.tensor(12_345.0)])
            update_cases.assert_equal(target, adafactor, case)


@pytest.mark.parametrize("kind", matrix_optim.STATES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_muon(target: Target, dtype, kind):
    """Whole vectors and cut ones, tall and wide; then steps whose products are exact."""
    rows = 6 if target.interpreted else 257
    shapes = [(rows, 401), (130, 3), (0, 4), (rows, 272)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    for rounding, grad_type in zip(ROUNDINGS, (torch.float32, torch.float16), strict=True):
        nearest = rounding == "nearest"
        options = {"rounding": rounding, "adjust_lr": list(ADJUSTMENTS)[nearest]}
        grads = [torch.randn(shape).to(grad_type) for shape in shapes]
        case = matrix_optim.muon_case(
            params, grads, kind, nesterov=nearest, maximize=nearest, offsets=[0, 3, 0, 16],
            grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0), **options)
        update_cases.assert_equal(target, muon, case)
        case = matrix_optim.exact_muon_case([(rows, 20), (9, 272)], dtype, kind, **options)
        update_cases.assert_equal(target, muon, case)


@pytest.mark.parametrize("kind", ("remainder", "kahan"))
def test_muon_of_special_values(target: Target, kind):
    special = special_values()
    n = len(special)
    values = [torch.randn(6, 272), special.repeat(n).view(n, n), random_bits(600).view(20, 30)]
    grads = [torch.randn(6, 272), special.repeat_interleave(n).view(n, n),
             random_bits(600, seed=2).view(20, 30)]
    for dtype, rounding in itertools.product(FLOATS, ROUNDINGS):
        params = [p.to(dtype) for p in values]
        states = "int8" if rounding == "stochastic" else dtype
        case = matrix_optim.muon_case(params, grads, states, rounding, offsets=[16, 5, 8])
        update_cases.assert_equal(target, muon, {**case, "masters": masters_of(params, kind)})


def test_muon_in_other_ways(target: Target):
    make = matrix_optim.muon_case
    case = make([torch.randn(20, 30).bfloat16()], [torch.full((20, 30), torch.inf)], "int8",
                found_inf=torch.tensor(1.0), steps=[torch.tensor(3.0)])
    after = update_cases.run(target, muon, case)
    for key in ("params", "momentum_buffers", "momentum_scales", "steps"):
        assert all(map(same_bits, after[key], case[key]))
    for shapes in ([], [(0, 4)], [(0, 4), (4, 0), (4, 5)]):
        params = [torch.randn(shape) for shape in shapes]
        update_cases.assert_equal(target, muon, make(params, [p.clone() for p in params]))
    for form, p in strided_forms(torch.randn(16, 33)):
        if form != "expanded":
            case = make([p.bfloat16()], [torch.ones(()).expand(p.shape)], torch.bfloat16)
            update_cases.assert_equal(target, muon, case)


@pytest.mark.parametrize("shape", ((40, 64), (64, 40), (1, 9), (130, 130)))
def test_orthogonalization_is_inside_its_bound(target: Target, shape):
    for steps in (1, 5):
        matrix_optim.assert_orthogonal(target, shape, steps)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_accumulate(target: Target, dtype, rounding):
    special = special_values()
    values = [torch.randn(6 if target.interpreted else 57, 401), torch.randn(()),
              torch.empty(0, 3), special.repeat(len(special)), random_bits(3000, seed=3),
              torch.randn(4, 272)]
    for grad_type in FLOATS:
        grads = [torch.randn(p.shape).to(grad_type) for p in values]
        grads[3] = special.repeat_interleave(len(special)).to(grad_type)
        totals = [p.to(dtype) for p in values]
        update_cases.assert_equal(target, accumulate, update_cases.accumulate_case(
            totals, grads, rounding, offsets=[0, 3, 0, 5, 2**40, 16]))
    for form, total in strided_forms(torch.randn(16, 33).to(dtype)):
        if form != "expanded":
            case = update_cases.accumulate_case([total], [torch.randn(total.shape)], rounding)
            update_cases.assert_equal(target, accumulate, case)
    update_cases.assert_equal(target, accumulate, update_cases.accumulate_case([], [], rounding))


@pytest.mark.parametrize("dtype", FLOATS)
def test_square_sums(target: Target, dtype):
    """Runs whole and cut, aligned and not; several types at once; an order that matters."""
    rows = 9 if target.interpreted else 257
    xs = [torch.randn(rows, 333).to(dtype), torch.randn(()), torch.empty(0, 3), torch.randn(1024),
          torch.randn(20_000).to(dtype), torch.randn(3001).half() * 1e-3, random_bits(500),
          special_values(), *[x for _, x in strided_forms(torch.randn(64, 129).to(dtype))]]
    got, want = target.run(square_sums, xs), REFERENCE.run(square_sums, xs)
    assert got[6:8].isnan().all() and want[6:8].isnan().all()  # the contract names no NaN's bits
    got[6:8] = want[6:8] = 0
    assert same_bits(got, want)
    cases.assert_bits(target, square_sums, [])


@pytest.mark.parametrize("name", update_cases.OPS)
def test_found_inf_changes_nothing(target: Target, name):
    op, make = update_cases.OPS[name]
    params = [torch.randn(20, 300).bfloat16()]
    case = make(params, [torch.full((20, 300), torch.inf)], "int8", found_inf=torch.tensor(1.0),
                steps=[torch.tensor(3.0)])
    after = update_cases.run(target, op, case)
    for key, before in case.items():
        if isinstance(before, list) and before and isinstance(before[0], torch.Tensor):
            assert all(map(same_bits, after[key], before))


@pytest.mark.parametrize("name", update_cases.OPS)
def test_updates_of_strided_and_empty_tensors(target: Target, name):
    op, make = update_cases.OPS[name]
    full, empty = torch.randn(4, 50), torch.empty(0, 50)
    for params in ([full, empty], [empty, full], [empty], []):
        case = make(list(params), [torch.randn(p.shape) for p in params], torch.float32)
        after = update_cases.assert_equal(target, op, case)
        assert [s.item() for s in after["steps"]] == [i + 1 for i in range(len(params))]
    for form, p in strided_forms(torch.randn(16, 33)):
        if form != "expanded":
            grads = [torch.ones(()).expand(p.shape)]  # as .sum() gives
            case = make([p.bfloat16()], grads, torch.bfloat16)
            update_cases.assert_equal(target, op, case)


def test_a_shard_s_update_is_that_of_the_whole(target: Target):
    p, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 256)
    whole = update_cases.adamw_case([p], [g], torch.bfloat16, offsets=[0])
    after = update_cases.run(target, adamw, whole)
    keys = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for rows, offset in ((slice(0, 23), 0), (slice(23, 64), 23 * 256)):
        shard = {**whole, **{key: [whole[key][0][rows].clone()] for key in keys},
                 "offsets": [offset]}
        for key, found in update_cases.run(target, adamw, shard).items():
            if key in keys:
                assert same_bits(found[0], after[key][0][rows])


def test_steps_on_the_host_and_far_ones(target: Target):
    """A large step's power, by squaring in fp64, has the host's bits."""
    params, grads = [torch.randn(300)], [torch.randn(300)]
    for step in (0.0, 1.0, 998.0, 123_456.0, 2.0**24 - 2):
        case = update_cases.adamw_case(params, grads, torch.float32, steps=[torch.tensor(step)],
                                  beta2=0.99999)
        update_cases.assert_equal(target, adamw, case)
