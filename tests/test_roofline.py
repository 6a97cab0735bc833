"""Which ceiling bounds a call, and by how much."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import Work, against, product


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GB/s for 1 MiB, and round numbers of operations a second."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(roofline, "_streams", {(1 << 20, threads): 1e9})
    monkeypatch.setattr(roofline, "_peaks",
                        {threads: {"fp32": 1e9, "int8": 4e9, "roots": 1e8, "wide_products": 2e9}})


@pytest.mark.parametrize(("operations", "bound", "by"), (
    ({}, 1e-3, "memory"),
    ({"fp32": 5e5}, 1e-3, "memory"),
    ({"fp32": 3e6}, 3e-3, "products"),
    ({"fp32": 3e6, "int8": 4e6}, 4e-3, "products"),  # of one kind of port: one after the other
    ({"roots": 2e5, "wide_products": 3e6}, 2e-3, "roots"),  # of two kinds: at once
), ids=str)
def test_what_bounds(operations: dict[str, float], bound: float, by: str) -> None:
    row = against(Work(1e6, operations), 8e-3, torch.get_num_threads())
    assert row["bound by"] == by and row["operations"] == sum(operations.values())
    assert row["bound [s]"] == pytest.approx(bound)
    assert row["fraction of bound"] == pytest.approx(bound / 8e-3)


def test_product() -> None:
    """An fp16 product, and a bf16 one without an instruction for it, multiply as fp32."""
    assert product(2, 3, 5, torch.float32) == Work(4 * (10 + 15 + 6), {"fp32": 60.0})
    assert product(2, 3, 5, torch.int8, torch.bfloat16) == Work(10 + 15 + 12, {"int8": 60.0})
    for dtype in (torch.float16, torch.bfloat16):
        assert product(2, 3, 5, dtype) == Work(2 * (10 + 15 + 6), {"fp32": 60.0})


def test_what_is_recorded() -> None:
    (found,) = roofline.measured().values()
    assert found["bytes/s by size"] == {"1048576": 1e9} and found["operations/s"]["int8"] == 4e9
