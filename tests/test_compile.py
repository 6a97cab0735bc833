"""torch.compile(fullgraph=True): the same bits as eager, step after step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowp
from lowp.key import clock
from lowp.recipe import RECIPES
from tests.tensors import same_bits


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        lowp.Linear(64, 96, precision=name, activation="gelu", name="up"),
        nn.LayerNorm(96),
        lowp.Linear(96, 10, precision=name, name="down"),
    )


def block(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), lowp.MLP(64, 96, 10, precision=name, name="block"))


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


@pytest.mark.parametrize("make", (model, block))
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_equal_eager(name, make):
    """aot_eager runs the traced graph with eager's kernels: even layer norm has the same bits."""
    torch._dynamo.reset()
    eager = make(name)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for step, rows in ((1, 32), (2, 32), (3, 17)):  # the step moves on, a shape changes
        clock.set(step)
        x = torch.randn(rows, 64)
        assert all(map(same_bits, run(compiled, x), run(eager, x)))


@pytest.mark.parametrize("name", ("bf16", "int8_full"))
def test_inductor(name):
    """Inductor fuses layer norm its own way: the layers' bits are the same, the rest is near."""
    torch._dynamo.reset()
    eager = model(name)[0]
    compiled = torch.compile(eager, fullgraph=True)
    for step in (1, 2):
        clock.set(step)
        x = torch.randn(16, 64)
        assert all(map(same_bits, run(compiled, x), run(eager, x)))


def test_stochastic_bits_follow_the_clock_in_a_compiled_graph():
    torch._dynamo.reset()
    layer = model("int8_full")[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 64)
    found = []
    for step in (1, 2, 1):
        clock.set(step)
        found.append(run(compiled, x)[1])
    assert same_bits(found[0], found[2]) and not same_bits(found[0], found[1])


def test_quantize_and_dequantize_compile():
    torch._dynamo.reset()

    def fake_quantize(x):
        return lowp.dequantize(lowp.quantize(x, "row", rounding="stochastic"))

    x = torch.randn(5, 40)
    assert same_bits(torch.compile(fake_quantize, fullgraph=True)(x), fake_quantize(x))
