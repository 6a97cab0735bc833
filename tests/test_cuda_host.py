"""The CUDA kernels' bodies, built for the host: the case lists of the CPU kernels, bit for bit.

What a GPU runs differently is the grid, which is swept here, the exchange between lanes, which
plain loops stand for, and the tensor cores (tests/cuda_host/products.cpp).
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch

from lowp import native
from lowp.ops import product
from lowp.ops.activation_grad import activation_grad
from lowp.ops.library import OPS
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.muon import ADJUSTMENTS
from lowp.ops.scaled_mm import scaled_mm
from tests import (
    cases,
    cuda_host,
    test_activation,
    test_bias_grad,
    test_gradients,
    test_linear_op,
    test_matrix_optim_ops,
    test_optim_ops,
    test_quantize,
    test_scaled_mm,
)
from tests.targets import CPU
from tests.tensors import FLOATS, random_bits, special_values
from tests.updates import assert_equal

ROUNDINGS = ("nearest", "stochastic")
GRIDS = (1, 3, 1000)  # blocks: fewer than there is work, an odd number, more


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return cuda_host.build(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def kernels(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host build in the place of the CPU kernels, so that their tests run it."""
    host.set_blocks(3)
    monkeypatch.setattr(native, "cuda", host)
    for op in OPS.values():
        if "cuda" in op.kernels:
            monkeypatch.setitem(op.kernels, "cpu", op.kernels["cuda"])


@pytest.fixture(params=GRIDS)
def grids(kernels: None, host: ModuleType, request: pytest.FixtureRequest) -> None:
    """The same on grids of several sizes."""
    host.set_blocks(request.param)


def test_every_op_has_a_cuda_kernel() -> None:
    assert [name for name, op in OPS.items() if "cuda" not in op.kernels] == []


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", test_quantize.GRANULARITIES)
def test_quantize_values(kernels: None, granularity: str, rounding: str) -> None:
    for dtype in FLOATS:
        test_quantize.test_kernel_equals_reference(None, dtype, granularity, rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", test_quantize.GRANULARITIES)
def test_quantize_shapes(grids: None, granularity: str, rounding: str) -> None:
    test_quantize.test_shapes_strides_and_threads(None, None, granularity, rounding)
    for shape in ((2, 20_000), (3, 16_384), (64, 512), (128, 256), (1, 4096), (70, 48), (16, 16)):
        x = torch.randn(shape)  # whole vectors, and rows beyond what a block of threads holds
        for dtype, block in itertools.product(FLOATS, (16, 64, 128, 1000)):
            cases.assert_bits(CPU, OPS["quantize"], x.to(dtype), granularity, block, rounding, 1,
                              torch.tensor(2), 3, 4, 16)
        cases.assert_bits(CPU, OPS["quantize_row_col"], x, rounding, 1, None, 2, 6, 7, 8)


@pytest.mark.parametrize("granularity", test_quantize.GRANULARITIES)
def test_dequantize(kernels: None, granularity: str) -> None:
    for dtype in FLOATS:
        test_quantize.test_dequantize_every_code(None, granularity, dtype)


@pytest.mark.parametrize("activation", test_activation.ALL)
def test_activation_grad(kernels: None, activation: str) -> None:
    for dtype in FLOATS:
        test_activation.test_kernel_equals_reference(None, dtype, activation)
    test_activation.test_strides_threads_and_mixed_types(None, activation)


def test_bias_grad_values(grids: None) -> None:
    for dtype in FLOATS:
        test_bias_grad.test_kernel_equals_reference(None, dtype)
    test_bias_grad.test_strides_and_threads(None, None)


@pytest.mark.parametrize("kind", test_optim_ops.STATES, ids=str)
@pytest.mark.parametrize("name", test_optim_ops.OPS)
def test_updates(kernels: None, name: str, kind: object) -> None:
    for dtype in FLOATS:
        test_optim_ops.test_kernel_equals_reference(None, name, dtype, kind)
    test_optim_ops.test_special_values(None, name, kind)


def test_update_options(kernels: None) -> None:
    test_optim_ops.test_options(None)
    test_optim_ops.test_draws_depend_on_the_global_element_alone()
    for name in test_optim_ops.OPS:
        for master in ("remainder", "kahan"):
            test_optim_ops.test_masters(None, name, master)
        test_optim_ops.test_a_step_of_0_keeps_every_remainder(None, name)
        test_optim_ops.test_found_inf_changes_nothing(name)
        test_optim_ops.test_strides_and_empty_neighbours(name)


def test_adafactor(kernels: None) -> None:
    for dtype in FLOATS:
        test_matrix_optim_ops.test_adafactor_equals_reference(None, None, dtype)
    test_matrix_optim_ops.test_adafactor_of_tiny_gradients(None)
    test_matrix_optim_ops.test_masters_and_special_values(None, "adafactor")
    test_matrix_optim_ops.test_found_inf_neighbours_and_strides("adafactor")


def test_adafactor_on_grids(grids: None) -> None:
    """Vectors, matrices and batches of them, empty ones between, in one launch a stage."""
    shapes = [(i % 3 + 1, i % 4 * 5, i % 5 * 70 + 3) if i % 2 else (i * 90,) for i in range(30)]
    params = [torch.randn(shape).bfloat16() for shape in shapes]
    grads = [torch.randn(p.shape) for p in params]
    assert_equal(OPS["adafactor"], test_matrix_optim_ops.adafactor_case(params, grads))


def test_muon(kernels: None) -> None:
    for dtype, kind in itertools.product(FLOATS, test_matrix_optim_ops.STATES):
        test_matrix_optim_ops.test_muon_equals_reference(None, dtype, kind)
        test_matrix_optim_ops.test_muon_of_exact_products_equals_reference(dtype, kind)
    test_matrix_optim_ops.test_masters_and_special_values(None, "muon")
    test_matrix_optim_ops.test_found_inf_neighbours_and_strides("muon")


def test_muon_on_grids(grids: None) -> None:
    """Many matrices, tall and wide, empty ones between, in one launch before the products and one
    behind."""
    shapes = [(i % 5 * 7, i % 3 * 150 + 1) for i in range(30)]
    params = [torch.randn(shape).bfloat16() for shape in shapes]
    for adjust in ADJUSTMENTS:
        case = test_matrix_optim_ops.muon_case(
            params, [torch.randn(p.shape) for p in params], "int8", adjust_lr=adjust,
            grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
        assert_equal(OPS["muon"], case)


def test_gradients_of_many_tensors(grids: None) -> None:
    for dtype in FLOATS:
        test_gradients.test_square_sums_equal_reference_and_exact(None, None, dtype)
        for rounding in ROUNDINGS:
            test_gradients.test_accumulate_equals_reference(None, dtype, rounding)
    test_gradients.test_accumulate_in_other_ways(None)


def test_many_tensors_in_one_launch(grids: None) -> None:
    """More than one upload's worth of table, empty tensors between, steps of their own."""
    shapes = [(i % 5 * 7, i % 3 * 150 + 1) for i in range(90)]
    for name in test_optim_ops.OPS:
        op, make = test_optim_ops.OPS[name]
        params = [torch.randn(shape).bfloat16() for shape in shapes]
        case = make(params, [torch.randn(p.shape) for p in params], "int8",
                    grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
        after = assert_equal(op, case)
        assert [s.item() for s in after["steps"]] == [i + 1 for i in range(len(params))], name


def test_epilogues(kernels: None) -> None:
    for activation in product.ACTIVATIONS:
        test_scaled_mm.test_epilogue(None, activation)
        for dtype in FLOATS:
            test_linear_op.test_epilogue_is_exact(None, None, dtype, activation)
            if activation != "none":
                test_linear_op.test_dgrad_epilogue_is_exact(None, None, dtype, activation)


def test_products(kernels: None) -> None:
    """Small shapes: what is tested is how operands and results are laid out, not the sums."""
    test_scaled_mm.test_strides_offsets_and_empty(None)
    test_scaled_mm.test_poisoned_groups_show(None)
    for dtype in FLOATS:
        test_linear_op.test_strides_and_empty(None, dtype)
    for value in (float("nan"), float("inf")):
        test_linear_op.test_nan_and_inf_go_where_ieee_sends_them(None, value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_wgrad_sums_the_bias_gradient(kernels: None, dtype: torch.dtype) -> None:
    """Groups of 64 rows and tiles of 128 columns, whole and cut; the layouts that sum apart."""
    forms = [torch.randn(m, n) for m, n in ((1, 3), (64, 128), (65, 129), (300, 257), (0, 5))]
    forms += [torch.randn(40, 70).t(), torch.randn(70, 90)[:, 3:50], torch.randn(9, 0)]
    forms += [random_bits(129 * 150).view(129, 150), special_values()[:, None].repeat(1, 9)]
    for dy, cols in itertools.product(forms, (0, 1, 2)):
        dy, x = dy.to(dtype), torch.randn(len(dy), cols).to(dtype)
        cases.assert_column_sums(CPU.run(linear_wgrad, dy, x, True, dtype)[1], dy)


def test_turned_codes(grids: None) -> None:
    """Operands that lie across the summed dimension, in tiles whole and cut."""
    for rows, depth in itertools.product((1, 16, 64, 65, 130), (1, 16, 128, 129, 300)):
        a = cases.codes(depth, rows).t()
        test_scaled_mm.assert_bits(a, cases.codes(depth, 3).t(), torch.rand(rows),
                                   torch.rand(3), None, "none", torch.float32, False)


def test_inline_division(host: ModuleType) -> None:
    """The division of the sm_90a epilogues: equal to IEEE's where the activations divide, from any
    reciprocal within an ulp. A tiny dividend comes with a power of two below it."""
    magnitude = torch.cat([random_bits(2_000_000, seed=1).abs(), special_values().abs()])
    magnitude = magnitude[~(magnitude < 2.0**-100)]
    divisor = random_bits(magnitude.numel(), seed=2).abs()
    near_one = 1 + torch.rand(magnitude.numel()) * torch.randint(0, 8, magnitude.shape)
    sign = torch.where(torch.rand(magnitude.numel()) < 0.5, -1.0, 1.0)
    tiny = random_bits(1_000_000, seed=3)
    tiny = tiny[tiny.abs() < 2.0**-100]
    one = torch.ones_like(near_one)
    cases = [
        (magnitude * sign, near_one), (magnitude * sign, one * 2),
        (one, divisor.clamp_min(1).clamp_max(7.2e37)), (one, torch.full_like(one, torch.inf)),
        (sign * (10 + 116 * torch.rand(sign.shape)), divisor.clamp_min(1)),
        (tiny, torch.full_like(tiny, 2.0)), (tiny, torch.ones_like(tiny)),
    ]
    for a, b in cases:
        power_of_two = bool((b == 1).all() or (b == 2).all())
        for ulps in (0,) if power_of_two else (-1, 0, 1):  # that reciprocal is exact
            assert host.wrong_divisions(a.data_ptr(), b.data_ptr(), a.numel(), ulps) == 0


def test_inline_reciprocal(host: ModuleType) -> None:
    """The same of the gradients' logistic function, whose result may be subnormal."""
    beyond = torch.ldexp(1 + torch.rand(1_000_000), torch.tensor([126.0, 127.0])[:, None]).view(-1)
    powers = torch.ldexp(torch.ones(128), torch.arange(128.0))
    b = torch.cat([random_bits(2_000_000).abs(), beyond, powers, special_values()])
    b = b[~(b < 1)].contiguous()
    for ulps in (-1, 0, 1):
        assert host.wrong_reciprocals(b.data_ptr(), b.numel(), ulps) == 0


def test_wrong_arguments_are_named(kernels: None) -> None:
    with pytest.raises(TypeError, match="activation_grad: dy must be float32"):
        activation_grad(torch.ones(3).long(), torch.ones(3), "relu")
    with pytest.raises(TypeError, match="scaled_mm: a must be int8"):
        scaled_mm(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1), torch.ones(1), None, "none",
                  torch.float32, False)
