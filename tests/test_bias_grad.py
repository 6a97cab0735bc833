"""bias_grad: the kernel equals the reference bit for bit, and the reference its bound."""

from __future__ import annotations

import pytest
import torch

from lowp.ops.bias_grad import bias_grad
from tests import cases
from tests.targets import CPU
from tests.tensors import FLOATS, strided_forms
from tests.tolerances import UNIT


@pytest.mark.parametrize("dtype", FLOATS)
def test_kernel_equals_reference(isa, dtype):
    for dy in cases.bias_grad_inputs(dtype):
        cases.assert_bias_grad(CPU, dy)


def test_strides_and_threads(isa, threads):
    for rows, cols in ((1, 1), (3, 7), (65, 129), (130, 2500)):
        for _, dy in strided_forms(torch.randn(rows, cols)):
            cases.assert_bias_grad(CPU, dy)


def test_bound():
    dy = torch.randn(5000, 64)
    limit = (64 + 5000 / 64) * UNIT * dy.double().abs().sum(0)
    assert ((bias_grad(dy) - dy.double().sum(0)).abs() <= limit).all()


def test_errors_and_opcheck():
    with pytest.raises(ValueError, match=r"bias_grad: dy must be a matrix, got shape \(3,\)"):
        bias_grad(torch.ones(3))
    with pytest.raises(TypeError, match=r"dy must be float32, .*, got torch\.int64"):
        bias_grad(torch.ones(3, 3, dtype=torch.int64))
    for dy in (torch.randn(3, 4), torch.randn(3, 4).t(), torch.randn(0, 4), torch.randn(3, 0)):
        torch.library.opcheck(torch.ops.lowp.bias_grad.default, (dy,))
