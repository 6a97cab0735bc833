"""SGD, Adam, Lion, Adafactor and Muon against torch's own where torch has them.

    pytest benchmarks/optimizers.py --benchmark-enable

AdamW, with the optimizers of other libraries, is in adamw.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowp
from benchmarks.conftest import Compare

SIZE = (2048, 2048)
CASES = (
    ("SGD", {"momentum": 0.9}), ("Adam", {"weight_decay": 0.1}), ("Lion", {}), ("Adafactor", {}),
    ("Muon", {}),
)


@pytest.mark.parametrize("master", (None, "remainder", "kahan"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_step(compare: Compare, name: str, options: dict[str, Any], dtype: torch.dtype,
              master: str | None) -> None:
    """One step over 4.2 M elements."""
    if dtype == torch.float32 and master is not None:
        pytest.skip("fp32 weights need no master")
    p = torch.randn(SIZE).to(dtype).requires_grad_()
    p.grad = torch.randn(SIZE).to(dtype)
    ours = getattr(lowp.optim, name)([p], lr=1e-3, master=master, **options)
    before = p.detach().clone()
    ours.step()
    assert p.isfinite().all() and not torch.equal(p, before)
    state = sum(t.nbytes for t in ours.state[p].values() if isinstance(t, torch.Tensor))
    candidates: dict[str, Callable[[], Any]] = {"lowp": ours.step}
    if hasattr(torch.optim, name):
        fused = {"fused": True} if name in ("SGD", "Adam") else {}
        q = p.detach().clone().requires_grad_()
        q.grad = p.grad.clone()
        candidates["torch"] = getattr(torch.optim, name)([q], lr=1e-3, **options, **fused).step
    labels = {"optimizer": name, "dtype": str(dtype), "master": master or "none",
              "state bytes/param": state / p.numel()}
    compare(labels, candidates, "lowp")
