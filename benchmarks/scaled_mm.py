"""scaled_mm against torch's int8 product with scales and bias after it, and torch's float products.

    pytest benchmarks/scaled_mm.py --benchmark-enable
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import lowp
from benchmarks.conftest import Compare
from benchmarks.roofline import product
from lowp.ops.scaled_mm import scaled_mm

SHAPES = ((1, 4096, 4096), (8, 1024, 1024), (32, 512, 512), (512, 512, 512), (512, 3072, 768),
          (2048, 1024, 1024), (2048, 2048, 2048))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_scaled_mm(compare: Compare, m: int, n: int, k: int) -> None:
    """bf16 out of int8 codes, row and column scales and a bias."""
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    rows, cols = torch.rand(m), torch.rand(n)
    bf16 = torch.bfloat16
    arguments = (a, b, rows, cols, torch.randn(n), "none", bf16, False)
    got = scaled_mm(*arguments)[0]
    with lowp.backend("reference"):
        assert torch.equal(got, scaled_mm(*arguments)[0])
    turned = b.t()
    x, w = torch.randn(m, k), torch.randn(n, k)
    pairs = {d: (x.to(d), w.to(d)) for d in (torch.float32, bf16, torch.float16)}
    candidates = {
        "lowp": lambda: scaled_mm(*arguments),
        "torch._int_mm + scales": lambda: (
            torch._int_mm(a, turned).float() * rows[:, None] * cols + arguments[4]
        ).to(bf16),
        **{f"torch {d}": lambda p=p: functional.linear(*p) for d, p in pairs.items()},
    }
    compare({"M": m, "N": n, "K": k}, candidates, "lowp", product(m, n, k, torch.int8, bf16))
