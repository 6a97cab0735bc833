"""The gradient side: accumulation against torch's add_, clipping against clip_grad_norm_.

    pytest benchmarks/gradients.py --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowp
from benchmarks.conftest import Compare
from lowp.ops.accumulate import accumulate

SIZE = (2048, 2048)


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
def test_accumulate(compare: Compare, rounding: str) -> None:
    """One addition of a bf16 gradient to a bf16 total."""
    total, grad = torch.randn(SIZE).bfloat16(), torch.randn(SIZE).bfloat16()
    arguments = (rounding, 0, torch.tensor(1), 1, [0], [0])
    once = total.clone()
    accumulate([once], [grad], *arguments)
    step = (once.double() - total.double() - grad.double()).abs()
    assert (step <= 2.0**-7 * (total.double() + grad.double()).abs()).all()
    compare({"op": f"accumulate {rounding}", "dtype": "torch.bfloat16"},
            {"lowp": lambda: accumulate([total], [grad], *arguments),
             "torch": lambda: total.add_(grad)}, "lowp")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_clip(compare: Compare, dtype: torch.dtype) -> None:
    """lowp's AdamW with the norm and the clipping inside the step, and after clip_grad_norm_."""
    def make(clip: float | None) -> tuple[torch.Tensor, Any]:
        p = torch.randn(SIZE).to(dtype).requires_grad_()
        p.grad = torch.randn(SIZE).to(dtype)
        return p, lowp.optim.AdamW([p], clip_grad_norm=clip)

    _, inside = make(1e6)
    p, plain = make(None)

    def outside() -> None:
        torch.nn.utils.clip_grad_norm_([p], 1e6)
        plain.step()

    compare({"op": "clip and step", "dtype": str(dtype)},
            {"lowp": inside.step, "torch": outside}, "lowp")
