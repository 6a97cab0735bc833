"""linear, linear_dgrad, linear_wgrad against torch's products of the same type.

    pytest benchmarks/linear.py --benchmark-enable
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.conftest import Compare
from benchmarks.roofline import Work, product
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from tests.tolerances import product_bound

SHAPES = ((1, 4096, 4096), (8, 1024, 1024), (32, 512, 512), (512, 512, 512), (512, 3072, 768),
          (2048, 1024, 1024))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("activation", ("none", "gelu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_forward(compare: Compare, dtype: torch.dtype, m: int, n: int, k: int,
                 activation: str) -> None:
    """act(x wᵀ + b): fused, against F.linear and the activation after it."""
    x, w, b = (t.to(dtype) for t in (torch.randn(m, k), torch.randn(n, k), torch.randn(n)))
    y = linear(x, w, b, "none", dtype, False)[0].double()
    exact = x.double() @ w.double().t() + b.double()
    assert ((y - exact).abs() <= product_bound(x, w, b, dtype)).all()

    def plain() -> object:
        z = functional.linear(x, w, b)
        return z if activation == "none" else functional.gelu(z)

    candidates = {"lowp": lambda: linear(x, w, b, activation, dtype, False), "torch": plain}
    labels = {"op": "linear", "activation": activation, "dtype": str(dtype), "M": m, "N": n, "K": k}
    compare(labels, candidates, "lowp", product(m, n, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES[3:])
def test_backward(compare: Compare, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """dy w, dyᵀ x and the column sums of dy, against the three torch calls."""
    dy, w, x = (t.to(dtype) for t in (torch.randn(m, n), torch.randn(n, k), torch.randn(m, k)))
    dx = linear_dgrad(dy, w, None, "none", dtype).double()
    bound = product_bound(dy, w.t(), None, dtype)
    assert ((dx - dy.double() @ w.double()).abs() <= bound).all()
    candidates = {
        "lowp": lambda: (linear_dgrad(dy, w, None, "none", dtype),
                         linear_wgrad(dy, x, True, dtype)),
        "torch": lambda: (dy @ w, dy.t() @ x, dy.sum(0)),
    }
    labels = {"op": "dgrad + wgrad + bias", "activation": "-", "dtype": str(dtype), "M": m, "N": n,
              "K": k}
    (unit, operations), = product(m, n, k, dtype).operations.items()
    nbytes = dy.nbytes + 2 * (w.nbytes + x.nbytes)  # dw and dx are as large as w and x
    compare(labels, candidates, "lowp", Work(nbytes, {unit: 2 * operations}))
