"""The gradient of an activation in the product before it, against a pass of its own.

    pytest benchmarks/mlp.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lowp
from benchmarks.conftest import Compare
from benchmarks.roofline import Work, product
from lowp.ops.activation_grad import activation_grad
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.reference.activation import derivative
from tests.tolerances import gradient_bound

SHAPES = ((512, 768, 3072), (2048, 512, 2048))  # tokens, width, hidden width
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_epilogue(compare: Compare, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """gelu'(z) * (dy w), against the product and the activation's gradient after it."""
    dy, w, z = (t.to(dtype) for t in (torch.randn(m, n), torch.randn(n, k), torch.randn(m, k)))
    factor = derivative(z.float(), "gelu")
    exact = factor.double() * (dy.double() @ w.double())
    error = linear_dgrad(dy, w, z, "gelu", dtype).double() - exact
    assert (error.abs() <= gradient_bound(dy, w.t(), factor, dtype)).all()
    candidates = {
        "lowp": lambda: linear_dgrad(dy, w, z, "gelu", dtype),
        "lowp, apart": lambda: activation_grad(linear_dgrad(dy, w, None, "none", dtype), z, "gelu"),
        "torch": lambda: torch.ops.aten.gelu_backward(dy @ w, z),
    }
    labels = {"op": "linear_dgrad gelu", "dtype": str(dtype), "M": m, "N": n, "K": k}
    work = product(m, k, n, dtype)
    compare(labels, candidates, "lowp", Work(work.bytes + z.nbytes, work.operations))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_mlp(compare: Compare, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """Forward and backward pass of the feed-forward block, against its two layers."""
    shapes = ((m, n), (k, n), (k,), (n, k), (n,))
    scales = (1.0, n**-0.5, 0.1, k**-0.5, 0.1)
    inputs = [(torch.randn(s) * scale).to(dtype).requires_grad_()
              for s, scale in zip(shapes, scales, strict=True)]
    dy = torch.randn(m, n).to(dtype)

    def apart(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return lowp.linear(lowp.linear(x, w1, b1, "gelu", "fp32"), w2, b2, "none", "fp32")

    def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2)

    def fused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return lowp.mlp(x, w1, b1, w2, b2, "gelu", "fp32")

    def passes(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(*inputs), inputs, dy)

    found, want = passes(fused), passes(apart)
    if dtype == torch.float32:
        assert all(map(torch.equal, found, want))
    candidates = {"lowp": lambda: passes(fused), "lowp, apart": lambda: passes(apart),
                  "torch": lambda: passes(plain)}
    labels = {"op": "mlp gelu", "dtype": str(dtype), "M": m, "N": n, "K": k}
    (unit, operations), = product(m, n, k, dtype).operations.items()
    nbytes = 2 * sum(t.nbytes for t in inputs) + 2 * dy.nbytes + 4 * m * k * dtype.itemsize
    compare(labels, candidates, "lowp", Work(nbytes, {unit: 6 * operations}))
