"""quantize and dequantize against the same written in torch eager.

    pytest benchmarks/quantize.py --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowp
from benchmarks.conftest import Compare
from benchmarks.measure import Candidates, interleaved
from benchmarks.roofline import DRAW, Work, sample
from lowp.ops.dequantize import dequantize
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col

SIZE = 4096
DIMS = {"tensor": None, "row": -1, "column": 0}


def eager(x: torch.Tensor, dim: int | None, stochastic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual five lines; their floor(x + rand) moves exact integers, too."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = amax.float() / 127
    v = x.float() / scale
    v = (v + torch.rand_like(v)).floor() if stochastic else v.round()
    return v.clamp(-127, 127).to(torch.int8), scale


def least_work(x: torch.Tensor, copies: int, rounding: str) -> Work:
    """One read of ``x``, a byte an element for each copy of codes, and its draw where there is one;
    scales apart."""
    codes = copies * x.numel()
    return Work(x.nbytes + codes,
                {"wide_products": codes * DRAW} if rounding == "stochastic" else {})


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
@pytest.mark.parametrize("granularity", DIMS)
def test_quantize(compare: Compare, granularity: str, rounding: str) -> None:
    """4096 x 4096 bf16."""
    x = torch.randn(SIZE, SIZE).bfloat16()
    small = x[:100, :999]
    arguments = (granularity, 0, rounding, 0, None, 0, 4, 0)
    with lowp.backend("reference"):
        want = quantize(small, *arguments)
    assert all(map(torch.equal, quantize(small, *arguments), want))
    candidates = {
        "lowp": lambda: quantize(x, *arguments),
        "torch eager": lambda: eager(x, DIMS[granularity], rounding == "stochastic"),
    }
    labels = {"op": "quantize", "granularity": granularity, "rounding": rounding}
    compare(labels, candidates, "lowp", least_work(x, 1, rounding))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_against_memory(rows: list[dict[str, Any]], benchmark: Any,
                             dtype: torch.dtype) -> None:
    """Bytes read and written a second, beside those of a multiplication in place."""
    x = torch.randn(SIZE, SIZE).to(dtype)
    in_place = x.clone()
    candidates: Candidates = {
        rounding: lambda r=rounding: quantize(x, "row", 0, r, 0, None, 0, 4, 0)
        for rounding in ("nearest", "stochastic")
    }
    times = interleaved({**candidates, "stream": lambda: in_place.mul_(1.0)}, rounds=20)
    stream = 2 * x.nbytes / times["stream"]
    for rounding in candidates:
        rate = (x.nbytes + x.numel()) / times[rounding]
        rows.append({"op": f"quantize {dtype}", "granularity": "row", "rounding": rounding,
                     "lowp [s]": times[rounding], "GB/s": rate / 1e9, "stream GB/s": stream / 1e9,
                     "of the stream": rate / stream,
                     "times as long as nearest": times[rounding] / times["nearest"],
                     "work": sample(least_work(x, 1, rounding))})
    benchmark.pedantic(candidates["nearest"], rounds=5, warmup_rounds=1)


def test_row_and_column_in_one_pass(compare: Compare) -> None:
    """Both sets of codes that a backward pass needs, the second one transposed."""
    x = torch.randn(SIZE, SIZE).bfloat16()
    candidates = {
        "lowp": lambda: quantize_row_col(x, "stochastic", 0, None, 0, 6, 7, 0),
        "torch eager": lambda: (eager(x, -1, True), eager(x, 0, True)[0].t().contiguous()),
    }
    labels = {"op": "quantize_row_col", "granularity": "row + column", "rounding": "stochastic"}
    compare(labels, candidates, "lowp", least_work(x, 2, "stochastic"))


def test_dequantize(compare: Compare) -> None:
    """int8 codes with row scales back to bf16."""
    codes = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)
    scale = torch.rand(SIZE, 1)
    y = dequantize(codes, scale, "row", 0, torch.bfloat16)
    assert torch.equal(y, (codes * scale).bfloat16())
    candidates = {
        "lowp": lambda: dequantize(codes, scale, "row", 0, torch.bfloat16),
        "torch eager": lambda: (codes * scale).bfloat16(),
    }
    compare({"op": "dequantize", "granularity": "row", "rounding": "nearest"}, candidates, "lowp",
            Work(codes.nbytes + scale.nbytes + y.nbytes))
