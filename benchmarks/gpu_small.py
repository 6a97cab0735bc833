"""Every op of the CUDA backend once, on small and ragged shapes: what compute-sanitizer runs.

    compute-sanitizer python -m benchmarks.gpu_small
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import lowp
from lowp.ops.accumulate import accumulate
from lowp.ops.activation_grad import activation_grad
from lowp.ops.adafactor import adafactor
from lowp.ops.adamw import adamw
from lowp.ops.bias_grad import bias_grad
from lowp.ops.dequantize import dequantize
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import scaled_mm
from lowp.ops.square_sums import square_sums
from tests import update_cases
from tests.targets import moved
from tests.test_matrix_optim_ops import adafactor_case
from tests.updates import masters_of

SHAPES = ((1, 1), (3, 7), (17, 129), (64, 256), (130, 1040), (2, 5000))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def quantization() -> None:
    roundings = ("nearest", "stochastic")
    for (rows, cols), dtype, rounding in itertools.product(SHAPES, DTYPES, roundings):
        x = torch.randn(rows, cols, device="cuda").to(dtype)
        for granularity in ("tensor", "row", "column", "block"):
            q, scale = quantize(x, granularity, 64, rounding, 1, None, 2, 4, 3)
            dequantize(q, scale, granularity, 64, dtype)
        quantize_row_col(x, rounding, 1, None, 2, 6, 7, 3)
        activation_grad(x, x, "gelu")
        bias_grad(x)


def products() -> None:
    for m, n, k in ((1, 1, 1), (3, 17, 33), (130, 70, 64), (300, 264, 128), (64, 128, 1024)):
        for dtype in DTYPES:
            x, w, dy = (torch.randn(s, device="cuda").to(dtype) for s in ((m, k), (n, k), (m, n)))
            linear(x, w, torch.randn(n, device="cuda"), "gelu", dtype, True)
            linear_dgrad(dy, w, None, "none", dtype)
            linear_dgrad(dy, w, x, "gelu", dtype)
            linear_wgrad(dy, x, True, torch.float32)
        row, col = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        for b in (codes(n, k), codes(k, n).t()):
            scaled_mm(codes(m, k), b, row, col, None, "silu", torch.bfloat16, True)


def updates() -> None:
    """Every state, with each kind of master and without one."""
    params = [torch.randn(shape).bfloat16() for shape in SHAPES]
    grads = [torch.randn(p.shape) for p in params]
    masters = (None, masters_of(params, "remainder"), masters_of(params, "kahan"))
    kinds = (torch.float32, torch.bfloat16, "int8")
    cases = [(adamw, update_cases.adamw_case(params, grads, torch.bfloat16, amsgrad=True))]
    for (op, make), kind, kept in itertools.product(update_cases.OPS.values(), kinds, masters):
        coupled = {"coupled": True} if op is adamw else {}
        cases.append((op, {**make(params, grads, kind), **coupled, "masters": kept}))
    cases += [(adafactor, {**adafactor_case(params, grads), "masters": kept}) for kept in masters]
    cases.append((accumulate, update_cases.accumulate_case(params, grads, "stochastic")))
    for op, case in cases:
        op(*moved(list(case.values()), "cuda"))
    square_sums(moved(params, "cuda"))


def main() -> None:
    """All of it, on the CUDA backend."""
    with lowp.backend("cuda"):
        quantization()
        products()
        updates()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
