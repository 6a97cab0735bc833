"""Beyond 2^31 elements, where an int32 offset wraps: every op, both kernel families, on a GPU.

Everything is 0 but the last rows, which must come out as they do alone.
"""

from __future__ import annotations

import pytest
import torch

import lowp
from lowp.ops.accumulate import accumulate
from lowp.ops.activation_grad import activation_grad
from lowp.ops.adafactor import adafactor
from lowp.ops.bias_grad import bias_grad
from lowp.ops.dequantize import dequantize
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import scaled_mm
from lowp.ops.square_sums import square_sums
from tests import cases, update_cases
from tests.targets import REFERENCE, Target, moved
from tests.tensors import same_bits
from tests.test_matrix_optim_ops import adafactor_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("room")]
FAR, COLS = 2**31 + 4096, 4096
ROWS = FAR // COLS
BF16 = torch.bfloat16


@pytest.fixture
def room(gpu_target: Target) -> None:
    """Free GPU memory for four tensors of 16 bits, and their codes."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("24 GiB of GPU memory are not free")


def ending_with(tail: torch.Tensor, rows: int) -> torch.Tensor:
    """``rows`` rows of zeros whose last ones are ``tail``."""
    x = torch.zeros(rows, *tail.shape[1:], dtype=tail.dtype, device="cuda")
    x[rows - len(tail):] = tail.cuda()
    return x


@pytest.mark.parametrize("granularity", ("tensor", "row", "column", "block"))
def test_quantize_and_dequantize(gpu_target: Target, granularity):
    tail = torch.randn(2, COLS).bfloat16()
    x = ending_with(tail, ROWS)
    draws = ("stochastic", 1, torch.tensor(3), 2, 4)
    with lowp.backend(gpu_target.backend):
        codes, scale = quantize(x, granularity, 64, *draws, 0)
        back = dequantize(codes, scale, granularity, 64, BF16)
    offset = (ROWS - 2) * COLS
    want = REFERENCE.run(quantize, tail, granularity, 64, *draws, offset)
    whole = scale if granularity in ("tensor", "column") else scale[-2:]
    assert same_bits(codes[-2:].cpu(), want[0]) and same_bits(whole.cpu(), want[1])
    again = REFERENCE.run(dequantize, want[0], want[1], granularity, 64, BF16)
    assert same_bits(back[-2:].cpu(), again)


def test_turned_codes(gpu_target: Target):
    tail = torch.randn(2, COLS).bfloat16()
    x = ending_with(tail, ROWS)
    with lowp.backend(gpu_target.backend):
        got = quantize_row_col(x, "nearest", 1, None, 2, 6, 7, 0)
    want = REFERENCE.run(quantize_row_col, tail, "nearest", 1, None, 2, 6, 7, 0)
    assert same_bits(got[0][-2:].cpu(), want[0]) and same_bits(got[1][-2:].cpu(), want[1])
    assert same_bits(got[2][:, -2:].cpu(), want[2]) and same_bits(got[3].cpu(), want[3])


def test_gradients_of_activation_and_bias(gpu_target: Target):
    tail = torch.randn(2, COLS).bfloat16()
    x = ending_with(tail, ROWS)
    with lowp.backend(gpu_target.backend):
        dz, db = activation_grad(x, x, "gelu"), bias_grad(x)
    assert same_bits(dz[-2:].cpu(), REFERENCE.run(activation_grad, tail, tail, "gelu"))
    assert same_bits(db.cpu(), tail.float().sum(0))  # of two, and zeros: exact in any order


@pytest.mark.parametrize(("rows", "depth", "cols"), ((2**21 + 64, 1024, 64),
                                                     (2**17 + 64, 64, 2**14 + 64)),
                         ids=("operand", "result"))
def test_products(gpu_target: Target, rows, depth, cols):
    """Integers, whose sums are exact, so that one rounding remains."""
    a, b = cases.codes(64, depth), cases.codes(cols, depth)
    far, scales = ending_with(a, rows), (torch.ones(1), torch.ones(1))
    options = (None, "none", BF16, False)
    want = REFERENCE.run(scaled_mm, a, b, *scales, *options)[0]
    with lowp.backend(gpu_target.backend):
        got = scaled_mm(far, b.cuda(), *moved(scales, "cuda"), *options)[0]
    assert same_bits(got[-64:].cpu(), want)
    del got, far
    a, b = (a % 4).bfloat16(), (b % 4).bfloat16()
    far, want = ending_with(a, rows), (a.float() @ b.float().t()).bfloat16()
    with lowp.backend(gpu_target.backend):
        got = linear(far, b.cuda(), *options)[0]
        assert same_bits(got[-64:].cpu(), want)
        got = linear_dgrad(far, b.cuda().t().contiguous(), None, "none", BF16)
        assert same_bits(got[-64:].cpu(), want)
        got = linear_dgrad(far, b.cuda().t().contiguous(), got, "relu", BF16)
        assert same_bits(got[-64:].cpu(), want * (want > 0))


@pytest.mark.parametrize("turned", (False, True))
def test_weight_gradients(gpu_target: Target, turned):
    dy, x = ((cases.codes(64, width) % 4).bfloat16() for width in (64, 1024))
    if turned:
        dy, x = x, dy
    with lowp.backend(gpu_target.backend):
        dw, db = linear_wgrad(ending_with(dy, 2**21 + 64), ending_with(x, 2**21 + 64), True, BF16)
    assert same_bits(dw.cpu(), (dy.float().t() @ x.float()).bfloat16())
    assert same_bits(db.cpu(), dy.float().sum(0))


@pytest.mark.parametrize("kind", (BF16, "int8"))
@pytest.mark.parametrize("name", update_cases.OPS)
def test_updates(gpu_target: Target, name, kind):
    op, make = update_cases.OPS[name]
    params, grads = [torch.randn(512).bfloat16()], [torch.randn(512).bfloat16()]
    case = make(params, grads, kind, offsets=[FAR - 512], steps=[torch.tensor(4.0)])
    want = update_cases.run(REFERENCE, op, case)
    device = {**case, "offsets": [0], "steps": moved(case["steps"], "cuda")}
    for key, value in case.items():
        if isinstance(value, list) and key not in ("steps", "tensors", "offsets"):
            device[key] = [ending_with(t, len(t) * (FAR // 512)) for t in value]
    with lowp.backend(gpu_target.backend):
        op(*device.values())
    for key in ("params", "exp_avgs", "exp_avg_sqs", "momentum_buffers"):
        if key in case:
            assert same_bits(device[key][0][-512:].cpu(), want[key][0]), key


def test_adafactor(gpu_target: Target):
    """The last two rows move as the first two would: what else is summed is 0."""
    p, g = torch.randn(2, COLS).bfloat16(), torch.randn(2, COLS).bfloat16()
    moves = []
    for rows in (slice(0, 2), slice(ROWS - 2, ROWS)):
        param, grad = (torch.zeros(ROWS, COLS, dtype=BF16, device="cuda") for _ in range(2))
        param[rows], grad[rows] = p.cuda(), g.cuda()
        case = adafactor_case([torch.zeros(1, 1)], [torch.zeros(1, 1)], "nearest")
        case.update(params=[param], grads=[grad], steps=moved(case["steps"], "cuda"),
                    row_vars=[torch.zeros(ROWS, 1, device="cuda")],
                    col_vars=[torch.zeros(1, COLS, device="cuda")],
                    variances=[torch.empty(0, device="cuda")])
        with lowp.backend(gpu_target.backend):
            adafactor(*case.values())
        moves.append([x.cpu() for x in (param[rows], case["row_vars"][0][rows],
                                        case["col_vars"][0])])
    assert not same_bits(moves[0][0], p)
    assert all(map(same_bits, *moves))


def test_accumulate_and_square_sums(gpu_target: Target):
    total, grad = torch.randn(512).bfloat16(), torch.randn(512).bfloat16()
    case = update_cases.accumulate_case([total], [grad], "stochastic", offsets=[FAR - 512])
    want = update_cases.run(REFERENCE, accumulate, case)
    far, far_grad = ending_with(total, FAR), ending_with(grad, FAR)
    with lowp.backend(gpu_target.backend):
        sums = square_sums([far])
        accumulate(*{**case, "totals": [far], "grads": [far_grad], "offsets": [0]}.values())
    assert same_bits(far[-512:].cpu(), want["totals"][0])
    assert same_bits(sums.cpu(), REFERENCE.run(square_sums, [total]))
