"""AdamW against torch's fused and foreach ones; torchao's and bitsandbytes' where they install.

    pytest benchmarks/adamw.py --benchmark-enable
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowp
from benchmarks.conftest import Compare
from benchmarks.roofline import DRAW, Work

SIZE = (4096, 4096)
SMALL = ((64,), (512,), (64, 64), (128, 128), (256, 256))
CASES = (
    (torch.float32, None, "nearest"),
    (torch.bfloat16, None, "nearest"),
    (torch.bfloat16, None, "stochastic"),
    (torch.bfloat16, "fp32", "stochastic"),
    (torch.bfloat16, "int8", "stochastic"),
    (torch.float16, None, "stochastic"),
)


def copied(p: torch.Tensor) -> torch.Tensor:
    """The same weights and gradients as tensors of their own: what torch's foreach makes of fp16
    (Inf, where eps vanishes beside a second moment of 0) nobody else is to work with."""
    own = p.detach().clone().requires_grad_()
    assert p.grad is not None
    own.grad = p.grad.clone()
    return own


def peers(p: torch.Tensor, state_dtype: str | None) -> dict[str, Callable[[], Any]]:
    """8-bit optimizers of other libraries, of those that are installed and run on a CPU."""
    found: dict[str, Callable[[], Any]] = {}
    if state_dtype != "int8":
        return found
    for label, module, name in (("torchao", "torchao.optim", "AdamW8bit"),
                                ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit")):
        try:
            step = getattr(importlib.import_module(module), name)([copied(p)], lr=1e-3).step
            step()
        except Exception as error:
            print(f"{label} is left out: {error}")
        else:
            found[label] = step
    return found


def least_work(params: list[torch.Tensor], states: list[dict[str, Any]], rounding: str) -> Work:
    """Weights and states are read and written, gradients read; each element takes a square root and
    a division, and a draw for each store that is rounded stochastically."""
    moments = [[t for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
               for state in states]
    numel, nbytes, drawn = 0, 0, 0
    for p, own in zip(params, moments, strict=True):
        numel += p.numel()
        nbytes += 3 * p.nbytes + 2 * sum(t.nbytes for t in own)
        drawn += sum(t.numel() for t in (p, *own) if t.dtype != torch.float32)
    draws = drawn * DRAW if rounding == "stochastic" else 0.0
    return Work(nbytes, {"roots": numel, "wide_products": draws})


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
        "torch fused": torch.optim.AdamW([copied(p)], fused=True).step,
        "torch foreach": torch.optim.AdamW([copied(p)], foreach=True).step,
        **peers(p, state_dtype),
    }
    labels = {"dtype": str(dtype), "states": state_dtype or "as weights", "rounding": rounding,
              "state bytes/param": state / p.numel()}
    compare(labels, candidates, "lowp", least_work([p], [ours.state[p]], rounding))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_small_tensors(compare: Compare, dtype: torch.dtype) -> None:
    """One step over 300 tensors of 64 to 65,536 elements, and each step's gradients new memory."""
    values = [torch.randn(SMALL[i % len(SMALL)]).to(dtype) for i in range(300)]
    grads = [[torch.randn_like(v) for v in values] for _ in range(2)]

    def of(kind: Any, **options: Any) -> tuple[list[torch.Tensor], Callable[[], Any]]:
        params = [v.clone().requires_grad_() for v in values]
        optimizer = kind(params, **options)
        turns = itertools.cycle(grads)

        def step() -> None:
            for p, g in zip(params, next(turns), strict=True):
                p.grad = g
            optimizer.step()

        return params, step

    plain, ours = of(lowp.optim.AdamW, rounding="nearest"), of(lowp.optim.AdamW)
    fused = of(torch.optim.AdamW, fused=True)
    for step in (plain[1], ours[1], fused[1]):
        step()
    for p, q in zip(plain[0], fused[0], strict=True):
        assert torch.allclose(p, q, rtol=float(torch.finfo(dtype).eps), atol=1e-7)
    states = [{"m": v, "v": v} for v in values]
    labels = {"dtype": str(dtype), "states": f"as weights, of {len(values)} small tensors",
              "rounding": "stochastic"}
    compare(labels, {"lowp": ours[1], "torch fused": fused[1]}, "lowp",
            least_work(values, states, "stochastic"))
