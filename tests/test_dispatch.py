"""Ops that go around torch's dispatcher do so only where nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowp
from lowp.ops import library
from lowp.ops.accumulate import accumulate
from lowp.ops.dequantize import dequantize
from lowp.ops.quantize import quantize
from tests.tensors import same_bits

ARGUMENTS = ("row", 0, "nearest", 0, None, 0, 4, 0)


@pytest.fixture
def dispatched(monkeypatch):
    """The names of the ops that went through the dispatcher, in order."""
    seen = []
    for op in (quantize, dequantize, accumulate):
        def overload(*args, op=op, inner=op._overload):
            seen.append(op.name)
            return inner(*args)

        monkeypatch.setattr(op, "_overload", overload)
    return seen


def test_both_ways_give_the_same(dispatched):
    x = torch.randn(5, 70)
    found = quantize(x, *ARGUMENTS)
    with torch.no_grad():
        parameter = quantize(torch.nn.Parameter(x), *ARGUMENTS)
    assert dispatched == []
    want = quantize(torch.nn.Parameter(x), *ARGUMENTS)  # of which gradients may be recorded
    assert dispatched == ["quantize"]
    assert all(map(same_bits, found, want)) and all(map(same_bits, parameter, want))


@torch.no_grad()
def test_lists_of_tensors(dispatched):
    class Mine(torch.Tensor):
        pass

    def add(kind):
        totals = [torch.ones(40).bfloat16(), torch.ones(3, 5).bfloat16().as_subclass(kind)]
        grads = [torch.full((40,), 0.3).bfloat16(), torch.full((3, 5), 0.7).bfloat16()]
        accumulate(totals, grads, "stochastic", 0, torch.tensor(1), 1, [0, 1], [0, 0])
        return totals

    plain = add(torch.Tensor)
    assert dispatched == []
    assert all(map(same_bits, plain, add(Mine)))
    assert dispatched == ["accumulate"]


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_modes_and_profilers_see_every_op():
    x = torch.randn(3, 8)
    with Names() as mode:
        quantize(x, *ARGUMENTS)
    assert "lowp::quantize" in mode.seen
    with torch.profiler.profile() as profile:
        quantize(x, *ARGUMENTS)
    assert "lowp::quantize" in {event.name for event in profile.events()}


@torch.no_grad()
def test_tracers_see_every_op():
    def both(x):
        return dequantize(*quantize(x, *ARGUMENTS), "row", 0, torch.float32)

    x, other = torch.randn(3, 8), torch.randn(3, 8)
    assert same_bits(torch.jit.trace(both, x)(other), both(other))
    assert same_bits(torch.fx.experimental.proxy_tensor.make_fx(both)(x)(other), both(other))


@torch.no_grad()
def test_tensors_whose_memory_is_not_their_value():
    negative = torch._neg_view(torch.randn(4, 6))
    assert negative.is_neg()
    found = quantize(negative, *ARGUMENTS)
    assert all(map(same_bits, found, quantize(negative.resolve_neg(), *ARGUMENTS)))
    batch = torch.randn(2, 3, 8)
    found = torch.func.vmap(lambda x: quantize(x, *ARGUMENTS))(batch)
    assert all(map(same_bits, found, quantize(batch, *ARGUMENTS)))
    assert quantize(torch.empty(3, 8, device="meta"), *ARGUMENTS)[0].is_meta
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(batch)
    assert all(map(same_bits, found, quantize(left[0], *ARGUMENTS)))


@torch.no_grad()
def test_subclasses_are_dispatched(dispatched):
    class Mine(torch.Tensor):
        pass

    quantize(torch.randn(3, 8).as_subclass(Mine), *ARGUMENTS)
    assert dispatched == ["quantize"]


def test_backends_are_chosen_all_the_same():
    with torch.no_grad(), lowp.backend("reference"):
        assert library.select("quantize", torch.device("cpu"), quantize.kernels) == "reference"
