"""AdamW against torch's fused and foreach ones; torchao's and bitsandbytes' where they install.

    pytest benchmarks/adamw.py --benchmark-enable
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowp
from benchmarks.conftest import Compare

SIZE = (4096, 4096)
CASES = (
    (torch.float32, None, "nearest"),
    (torch.bfloat16, None, "nearest"),
    (torch.bfloat16, None, "stochastic"),
    (torch.bfloat16, "fp32", "stochastic"),
    (torch.bfloat16, "int8", "stochastic"),
    (torch.float16, None, "stochastic"),
)


def peers(p: torch.Tensor, state_dtype: str | None) -> dict[str, Callable[[], Any]]:
    """8-bit optimizers of other libraries, of those that are installed and run on a CPU."""
    found: dict[str, Callable[[], Any]] = {}
    if state_dtype != "int8":
        return found
    for label, module, name in (("torchao", "torchao.optim", "AdamW8bit"),
                                ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit")):
        try:
            step = getattr(importlib.import_module(module), name)([p], lr=1e-3).step
            step()
        except Exception as error:
            print(f"{label} is left out: {error}")
        else:
            found[label] = step
    return found


@pytest.mark.parametrize(("dtype", "state_dtype", "rounding"), CASES, ids=str)
def test_adamw(compare: Compare, dtype: torch.dtype, state_dtype: str | None,
               rounding: str) -> None:
    """One step over 16.8 M elements."""
    p = torch.randn(SIZE).to(dtype).requires_grad_()
    p.grad = torch.randn(SIZE).to(dtype)
    options = {"state_dtype": state_dtype, "rounding": rounding}
    check, exact = torch.randn(300).requires_grad_(), torch.randn(300).requires_grad_()
    exact.data.copy_(check.data)
    check.grad = exact.grad = torch.randn(300)
    lowp.optim.AdamW([check]).step()
    torch.optim.AdamW([exact]).step()
    assert torch.allclose(check, exact, rtol=1e-6, atol=1e-7)
    ours = lowp.optim.AdamW([p], **options)
    ours.step()
    state = sum(t.nbytes for t in ours.state[p].values() if isinstance(t, torch.Tensor))
    candidates = {
        "lowp": ours.step,
        "torch fused": torch.optim.AdamW([p], fused=True).step,
        "torch foreach": torch.optim.AdamW([p], foreach=True).step,
        **peers(p, state_dtype),
    }
    labels = {"dtype": str(dtype), "states": state_dtype or "as weights", "rounding": rounding,
              "state bytes/param": state / p.numel()}
    compare(labels, candidates, "lowp")
