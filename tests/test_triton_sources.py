"""What must hold for every Triton kernel, read off its source, and how the backend is chosen."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lowp
from lowp.backend import BackendError
from lowp.ops.library import OPS

backend = importlib.import_module("lowp.backend")  # lowp.backend is the function
KERNELS = sorted((Path(__file__).resolve().parent.parent / "kernels").glob("*.py"))


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in KERNELS:
        yield path.name, ast.parse(path.read_text())


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def jitted(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(d) for d in node.decorator_list
        ):
            yield node


def test_every_op_has_a_triton_kernel_of_its_name():
    files = {path.stem for path in KERNELS}
    for name, op in OPS.items():
        assert "triton" in op.kernels and name in files, name


def test_every_launch_goes_through_the_guarded_launcher():
    for name, tree in trees():
        for callee, call in calls(tree):
            started = isinstance(call.func, ast.Subscript) or callee.endswith((".run", ".warmup"))
            assert not started or name == "launch.py", f"{name}:{call.lineno}: {callee}"
            if callee == "launch":
                assert any(k.arg is None and ast.unparse(k.value) == "EXACT" for k in call.keywords)


def test_masked_loads_say_what_the_rest_is():
    for name, tree in trees():
        for callee, call in calls(tree):
            given = {k.arg for k in call.keywords}
            assert callee != "tl.load" or "mask" not in given or "other" in given, (
                f"{name}:{call.lineno}")


def test_divisions_of_fp32_are_ieee_ones():
    """Triton's / of fp32 is approximate; of fp64, which scalars and sums use, it is not."""
    for name, tree in trees():
        for function in jitted(tree):
            for node in ast.walk(function):
                division = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
                wide = function.name in ("_advance", "divide_fp64")
                assert not division or wide, f"{name}:{node.lineno}"


def test_sizes_that_change_from_call_to_call_make_no_other_kernel():
    varying = {"rows", "n", "groups", "depth", "tensors", "chunk_blocks", "step", "seed_low",
               "seed_high", "tensor", "offset"}
    for name, tree in trees():
        for function in jitted(tree):
            decorator = ast.unparse(function.decorator_list[0])
            if "(" not in decorator and function.name.startswith("_"):
                continue  # inlined into the kernels
            for argument in function.args.args:
                kept = f"'{argument.arg}'" in decorator or "KEY" in decorator
                if argument.annotation is not None and argument.arg in varying:
                    assert kept, f"{name}: {function.name}: {argument.arg}"


def test_importing_lowp_imports_no_triton():
    code = ("import sys, lowp, lowp.ops.adamw; lowp.quantize(__import__('torch').ones(2, 2)); "
            "sys.exit('triton' in sys.modules or any(m.startswith('lowp.kernels') "
            "for m in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_reason_is_true(monkeypatch):
    installed = {"triton": "", "numpy": "2.4.6"}
    monkeypatch.setattr(backend, "_version", installed.get)
    assert "not installed" in backend._reason("triton")
    installed["triton"] = "3.5.1"
    assert backend._reason("triton") == "triton 3.5.1 is older than 3.6"
    installed["triton"] = "3.9.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backend._reason("triton") == "no GPU, and TRITON_INTERPRET=1 is not set"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend._reason("triton") == ""
    installed["triton"] = "3.6.0"
    needed = "the interpreter of triton 3.6.0 needs numpy < 2.4, not 2.4.6"
    assert backend._reason("triton") == needed
    installed["numpy"] = "2.3.5"
    assert backend._reason("triton") == ""


def test_order_of_choice_for_cuda_tensors(monkeypatch):
    """cuda, then triton, then the reference, each refusal with its reason."""
    device = torch.device("cuda")
    reasons = {"cuda": "", "triton": ""}
    monkeypatch.setattr(backend, "_reason", lambda name: reasons.get(name, ""))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    has = ("reference", "cpu", "triton", "cuda")
    assert backend.choose("quantize", device, has) == ("cuda", [])
    reasons["cuda"] = "broken"
    assert backend.choose("quantize", device, has) == ("triton", [("cuda", "broken")])
    reasons["triton"] = "absent"
    refused = [("cuda", "broken"), ("triton", "absent")]
    assert backend.choose("quantize", device, has) == ("reference", refused)
    monkeypatch.setenv("LOWP_STRICT", "1")
    with pytest.raises(BackendError, match="cuda: broken; triton: absent"):
        backend.select("quantize", device, has)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "_reason", lambda name: "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (lowp.backend("triton"),
          pytest.raises(BackendError, match="backend 'triton' was asked for a cpu tensor")):
        lowp.quantize(torch.ones(2, 2))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1" or bool(backend._reason("triton")),
                    reason="Triton does not interpret here")
def test_a_layer_runs_on_triton_forward_and_backward():
    x = torch.randn(5, 64, requires_grad=True)
    layer = lowp.Linear(64, 48, precision="int8")
    results = []
    for name in ("triton", "reference"):
        with lowp.backend(name):
            y = layer(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, dx))
    assert all(map(torch.equal, *results))
    with lowp.backend("triton"):
        assert {choice.backend for choice in lowp.explain(layer, x)} == {"triton"}
