"""The backend of a product by a measurement of its size: a made-up one, for there is no GPU."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lowp
from lowp import measured
from lowp.measured import Problem
from lowp.ops.library import OPS

backend = importlib.import_module("lowp.backend")  # lowp.backend is the function
CUDA = torch.device("cuda", 0)
HAS = ("reference", "cpu", "triton", "cuda")


@pytest.fixture
def reasons(tmp_path, monkeypatch):
    """A device with both backends, and a file in which Triton is the faster one for few tokens.

    Gives the reasons to refuse a backend, which are none."""
    rows = [("linear", "bf16", (16, 4096, 4096), 9.0, 7.0),
            ("linear", "bf16", (64, 4096, 4096), 9.0, 14.0),
            ("scaled_mm", "int8", (16, 4096, 4096), 5.0, 4.0)]
    text = json.dumps({"device": "made up", "rows": [
        {"op": op, "precision": precision, "sizes": sizes,
         "microseconds": {"cuda": cuda, "triton": triton}}
        for op, precision, sizes, cuda, triton in rows]})
    path = tmp_path / "measured.json"
    path.write_text(text)
    found = {"cuda": "", "triton": ""}
    monkeypatch.setattr(measured, "FILE", path)
    monkeypatch.setattr(measured, "_device_name", lambda index: "made up")
    monkeypatch.setattr(backend, "_reason", lambda name: found.get(name, ""))
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.delenv("LOWP_BACKEND", raising=False)
    forget()
    yield found
    monkeypatch.undo()
    forget()


def forget() -> None:
    backend._of_environment.cache_clear()
    measured._table.cache_clear()
    measured._nearest.cache_clear()


def chosen(op, *sizes, precision="bf16"):
    return backend.choose(op, CUDA, HAS, Problem(precision, sizes)).name


def test_the_nearest_measurement_names_the_fastest(reasons):
    found = backend.choose("linear", CUDA, HAS, Problem("bf16", (16, 4096, 4096)))
    assert found == ("triton", [("cuda", "measured slower for products like bf16 16 x 4096 x 4096: "
                                         "9.0 us, triton 7.0 us")])
    assert chosen("linear", 31, 4096, 4096) == "triton"  # by ratios: sqrt(16 64) = 32 lies between
    assert chosen("linear", 33, 4096, 4096) == "cuda"
    assert chosen("linear", 8, 2048, 8192) == "triton"
    assert chosen("scaled_mm", 16, 4096, 4096, precision="int8") == "triton"


def test_without_a_measurement_the_plain_order_holds(reasons, monkeypatch):
    for sizes in ((7, 4096, 4096), (16, 2047, 4096), (16, 4096, 8193), (0, 4096, 4096)):
        assert chosen("linear", *sizes) == "cuda"  # beyond a factor of 2 in one size
    assert chosen("linear", 16, 4096, 4096, precision="fp16") == "cuda"
    assert chosen("linear_dgrad", 16, 4096, 4096) == "cuda"
    assert backend.choose("linear", CUDA, HAS) == ("cuda", [])
    monkeypatch.setattr(measured, "_device_name", lambda index: "another")
    assert chosen("linear", 16, 4096, 4096) == "cuda"


def test_what_cannot_run_is_not_chosen(reasons):
    reasons["triton"] = "absent"
    found = backend.choose("linear", CUDA, HAS, Problem("bf16", (16, 4096, 4096)))
    assert found == ("cuda", [("triton", "absent")])
    reasons.update(triton="", cuda="broken")
    found = backend.choose("linear", CUDA, HAS, Problem("bf16", (64, 4096, 4096)))
    assert found == ("triton", [("cuda", "broken")])


def test_lowp_backend_overrides_it(reasons, monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setenv("LOWP_BACKEND", name)
        forget()
        for tokens in (16, 64):
            assert chosen("linear", tokens, 4096, 4096) == name


def test_ops_ask_with_the_sizes_of_their_products(reasons, monkeypatch):
    asked = []

    def select(op, device, has, problem):
        asked.append((op, problem))
        return "reference"

    monkeypatch.setattr(importlib.import_module("lowp.ops.library"), "select", select)
    x, w, dy = torch.randn(2, 5), torch.randn(3, 5), torch.randn(2, 3)
    OPS["linear"](x, w, None, "none", torch.float32, False)
    OPS["linear_dgrad"](dy, w, None, "none", torch.float32)
    OPS["linear_wgrad"](dy, x, True, torch.float32)
    OPS["scaled_mm"](x.to(torch.int8), w.to(torch.int8), torch.ones(1), torch.ones(1), None, "none",
                     torch.float32, False)
    OPS["bias_grad"](dy)
    assert asked == [("linear", Problem("fp32", (2, 3, 5))),
                     ("linear_dgrad", Problem("fp32", (2, 5, 3))),
                     ("linear_wgrad", Problem("fp32", (3, 5, 2))),
                     ("scaled_mm", Problem("int8", (2, 3, 5))), ("bias_grad", None)]


def test_explain_shows_it(reasons):
    layer = lowp.Linear(4096, 4096, precision="bf16", device="meta")
    with FakeTensorMode():
        x = torch.empty(4, 4, 4096, device=CUDA)
    explanation = lowp.explain(layer, x)
    found, text = {c.op: c.backend for c in explanation}, str(explanation)
    assert found == {"linear": "triton", "linear_dgrad": "cuda", "linear_wgrad": "cuda"}
    assert "refused cuda: measured slower for products like bf16 16 x 4096 x 4096" in text
