"""Layers that call the CPU kernels without the ops around them compute what the ops do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowp
from lowp.key import Key
from lowp.ops.library import Op
from lowp.ops.scaled_mm import MAX_K
from lowp.recipe import RECIPES, Operand, Product, Recipe
from lowp.weight_codes import shared_weight_codes
from tests.tensors import FLOATS, same_bits, strided_forms

STOCHASTIC, WHOLE = Operand(rounding="stochastic"), Operand("tensor", "stochastic")
OTHERS = {
    "stochastic everywhere": Recipe(*[Product("int8", STOCHASTIC, STOCHASTIC)] * 3, seed=5),
    "one scale a tensor": Recipe(*[Product("int8", WHOLE, WHOLE)] * 3, seed=2**63 + 9),
    "rows and tensors": Recipe(Product("int8", Operand(), WHOLE), Product("int8", WHOLE, Operand()),
                               Product("int8", STOCHASTIC, Operand())),
    "int8 for the weight alone": Recipe("bf16", "fp16", "int8"),
    "int8 for the input alone": Recipe("fp16", "int8", "fp32"),
}
ALL = {**RECIPES, **OTHERS}
SHAPES = ((1, 1, 1), (5, 7, 3), (64, 64, 64), (31, 130, 65), (6, 70, 99), (0, 4, 3), (4, 0, 3),
          (4, 3, 0))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that run from now on."""
    names: list[str] = []
    run = Op._run

    def spy(self: Op, *args: Any) -> Any:
        names.append(self.name)
        return run(self, *args)

    monkeypatch.setattr(Op, "_run", spy)
    return names


def results(x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe,
            activation: str) -> list[Tensor]:
    """Outputs with and without gradients to record, and the gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, bias)]
    key = Key(recipe.seed, 3, 7)
    y = lowp.linear(*leaves, activation, recipe, key=key)
    dy = torch.linspace(-2, 3, y.numel()).view(y.shape).to(y.dtype)
    with torch.no_grad():
        alone = lowp.linear(*leaves, activation, recipe, key=key)
    return [alone, y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def both_ways(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of results: straight from the kernels, and of ops, which a forced backend asks for."""
    direct = results(*args)
    with lowp.backend("cpu"):
        yield from zip(direct, results(*args), strict=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits(product_isa: str, dtype: torch.dtype, name: str) -> None:
    for m, n, k in SHAPES:
        x, w, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
        for activation in ("none", "gelu"):
            for given in (bias.to(dtype), None):
                for direct, op in both_ways(x.to(dtype), w.to(dtype), given, ALL[name], activation):
                    assert same_bits(direct, op), (m, n, k, activation)


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].output != Product("fp32")])
def test_operands_of_many_kinds(name: str) -> None:
    """Unlike types, strides, damaged numbers, a tensor whose sign is yet to be turned."""
    x, w, bias = torch.randn(12, 20), torch.randn(9, 20), torch.randn(9)
    x[2, 3], x[5, 1], w[4, 4] = float("nan"), float("inf"), float("-inf")
    w[1], bias[2] = 3e38, -0.0
    turned = torch.complex(x, x).conj().imag
    assert turned.is_neg()
    for left in (x, x.half(), turned, *[form for _, form in strided_forms(x)]):
        if left.dim() != 2 or left.shape[1] > 20:
            continue
        right = w[:, : left.shape[1]]
        for direct, op in both_ways(left, right.bfloat16(), bias.half(), ALL[name], "none"):
            assert direct.dtype == op.dtype
            assert torch.equal(direct.isnan(), op.isnan())
            assert same_bits(direct.nan_to_num(), op.nan_to_num())


def test_seeds_of_64_bits() -> None:
    """Of which torch's dispatcher, whose ints are signed, must not refuse the upper half."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    recipe = OTHERS["one scale a tensor"]
    assert recipe.seed >= 2**63
    x, w = torch.randn(6, 8), torch.randn(5, 8)
    direct = results(x, w, None, recipe, "none")
    with Watch():
        watched = results(x, w, None, recipe, "none")
    assert torch.ops.lowp.quantize.default in seen
    assert all(map(same_bits, direct, watched))


def test_ops_run_where_they_are_needed(ran: list[str]) -> None:
    layer = lowp.Linear(16, 16, precision="int8")
    x = torch.randn(4, 16)
    layer(x)
    assert not ran
    with lowp.backend("reference"):
        layer(x)
    assert ran == ["quantize", "quantize", "scaled_mm"]
    ran.clear()
    with shared_weight_codes():
        layer(x)
        layer(x)
    assert ran.count("scaled_mm") == 2 and ran.count("quantize_row_col") == 1


def test_refusals_are_those_of_the_ops() -> None:
    with pytest.raises(TypeError, match=r"lowp::linear: x must be float32.*got torch.float64"):
        lowp.linear(torch.ones(2, 3).double(), torch.ones(4, 3).double(), recipe="fp32")
    with pytest.raises(TypeError, match=r"lowp::quantize: x must be float32.*got torch.int64"):
        lowp.linear(torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3), recipe="int8")
    with pytest.raises(ValueError, match=f"K must be at most {MAX_K}"):
        lowp.linear(torch.ones(1, MAX_K + 1), torch.ones(1, MAX_K + 1), recipe="int8")


@pytest.mark.parametrize("grad_enabled", (False, True))
@pytest.mark.parametrize("recipe", ("int8", "bf16", "fp32"))
def test_what_has_left_a_transform(recipe: str, grad_enabled: bool) -> None:
    """A tensor that outlives torch.func.grad has no memory of its own, and stays a tensor."""
    left: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    layer, x = lowp.Linear(8, 6, precision=recipe), torch.randn(4, 8)
    torch.func.grad(loss)(x)
    with torch.set_grad_enabled(grad_enabled):
        assert same_bits(layer(left[0]).detach(), layer(x).detach())
