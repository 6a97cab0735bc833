"""Layers whose passes a CUDA graph replays: fresh noise in every replay, with the eager bits.

A stand-in for the graph records operators instead of kernels: tensors are places in memory that a
replay reads and writes again, everything else is frozen. Unlike a graph it also runs while it
records. tests/test_gpu.py has the true one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowp
from lowp import key, weight_codes
from lowp.key import clock
from lowp.recipe import Operand, Product, Recipe
from tests.tensors import same_bits

DRAWN = Product("int8", Operand(rounding="stochastic"), Operand(rounding="stochastic"))
RECIPE = Recipe(DRAWN, DRAWN, DRAWN, seed=5)
CPU = torch.device("cpu")


class Graph(TorchDispatchMode):
    """What runs inside is recorded; :meth:`replay` runs it again in the same memory."""

    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __enter__(self) -> Graph:
        Graph.capturing = True
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        Graph.capturing = False
        super().__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None,
                           ) -> Any:
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, found in self.calls:
                again = function(*args, **kwargs)
                for place, value in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(value)


@pytest.fixture(autouse=True)
def cpu_captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as a device that keeps the step and captures graphs."""
    for module in (key, weight_codes):
        monkeypatch.setattr(module, "is_capturing", lambda: Graph.capturing)
    monkeypatch.setattr(key, "_reads_there", lambda device: True)
    monkeypatch.setattr(key, "_stream_on", lambda device: 0)
    monkeypatch.setattr(key, "_capturing_device", lambda: CPU)
    yield
    clock._counters.clear()
    clock._copies.clear()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        lowp.Linear(24, 40, precision=RECIPE, activation="gelu", name="up"),
        lowp.Linear(40, 8, precision=RECIPE, name="down"),
    )


X = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))


def passes(module: nn.Module, x: Tensor = X) -> Tensor:
    """The loss; gradients in the parameters."""
    for p in module.parameters():
        p.grad = None
    loss = module(x).square().sum()
    loss.backward()
    return loss.detach()


def optimizer_of(module: nn.Module, **options: Any) -> lowp.optim.Optimizer:
    return lowp.optim.AdamW(module.parameters(), lr=1e-2, rounding="stochastic", **options)


def eager(steps: int, **options: Any) -> list[list[Tensor]]:
    """The weights after each step."""
    module = model()
    optimizer = optimizer_of(module, **options)
    found = []
    for _ in range(steps):
        passes(module)
        optimizer.step()
        found.append([p.detach().clone() for p in module.parameters()])
    return found


def assert_weights(module: nn.Module, expected: list[Tensor]) -> None:
    assert all(map(same_bits, module.parameters(), expected))


@pytest.mark.parametrize("together", (True, False), ids=("whole step", "passes alone"))
def test_replays_are_the_eager_steps(together: bool) -> None:
    """The update inside of the graph or behind it."""
    expected = eager(5)
    assert clock.step == 6
    clock.set(1)
    module = model()
    optimizer = optimizer_of(module)
    passes(module)  # the warm-up is the first step
    optimizer.step()
    with Graph() as graph:
        passes(module)
        if together:
            optimizer.step()
    for now in (2, 3, 4):
        if now > 2:
            graph.replay()
        if not together:
            optimizer.step()
        assert_weights(module, expected[now - 1])
        assert clock.step == now + 1
    passes(module)  # and on without the graph
    optimizer.step()
    assert_weights(module, expected[4])


def test_the_noise_of_replays_differs() -> None:
    layer = model()[0]
    with torch.no_grad():
        first = layer(X)
        with Graph() as graph:
            y = layer(X)
        found = []
        for step in (1, 2, 1):
            clock.set(step)
            graph.replay()
            found.append(y.clone())
    assert same_bits(first, found[0]) and same_bits(found[0], found[2])
    assert not same_bits(found[0], found[1])


def test_a_replay_that_found_inf_is_not_counted() -> None:
    module = model()
    optimizer = optimizer_of(module)
    optimizer.found_inf = torch.zeros(1)  # as a gradient scaler sets it
    passes(module)
    optimizer.step()
    with Graph() as graph:
        passes(module)
        optimizer.step()
    for found, now in ((1.0, 3), (0.0, 4), (1.0, 4), (0.0, 5)):
        optimizer.found_inf.fill_(found)
        graph.replay()
        assert clock.step == now


def quantized(x: Tensor) -> Tensor:
    return lowp.quantize(x, rounding="stochastic").codes


def accumulated(x: Tensor) -> Tensor:
    """A gradient added to one of 16 bits."""
    p = torch.zeros(24, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.full((24,), 3.0, dtype=torch.bfloat16)
    accumulation = lowp.optim.GradientAccumulation([("p", p)])
    (p * x[0].bfloat16()).sum().backward()
    accumulation.remove()
    return p.grad


@pytest.mark.parametrize("draw", (quantized, accumulated))
def test_whatever_draws_by_the_clock_draws_afresh(draw: Callable[[Tensor], Tensor]) -> None:
    draw(X)
    with Graph() as graph:
        found = draw(X)
    for step in (4, 5):
        clock.set(step)
        graph.replay()
        replayed = found.clone()
        assert same_bits(replayed, draw(X))
        clock.set(step + 7)
        assert not same_bits(replayed, draw(X))


def test_a_graph_quantizes_its_weights_itself() -> None:
    """Codes from before the capture would be those of an old weight; its own are not there yet."""
    layer = model()[0]
    with torch.no_grad(), weight_codes.shared_weight_codes() as store:
        layer(X)
        with Graph() as graph:
            y = layer(X)
        assert store.made == 1
        layer.weight.mul_(2)
        graph.replay()
        assert same_bits(y, layer(X))


def test_a_capture_needs_a_warm_up() -> None:
    layer = model()[0]
    with pytest.raises(RuntimeError, match="run a warm-up pass first"), Graph():
        layer(X)
    nearest = lowp.Linear(24, 8, precision="bf16")
    with Graph():
        nearest(X)  # draws nothing


def test_a_saved_step_stays_what_it_was() -> None:
    """A backward after the update has the bits of its forward."""
    module = model()
    loss = module(X).square().sum()
    clock.advance()
    found = torch.autograd.grad(loss, list(module.parameters()))
    clock.set(1)
    passes(module)
    assert all(map(same_bits, found, [p.grad for p in module.parameters()]))
