"""lowp.Linear against nn.Linear: a forward and backward pass of wide layers, a call of a small one.

Quantization, and that of the weight, is counted in every pass, as in a step of training.

    pytest benchmarks/layer.py --benchmark-enable
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowp
from benchmarks.conftest import Compare
from benchmarks.measure import interleaved, with_ratios
from benchmarks.roofline import Work, product, sample
from lowp.recipe import RECIPES
from tests.tolerances import RECIPE_ERROR

TOKENS = 1024
DTYPES = (torch.float32, torch.bfloat16)
PRODUCT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
                 "int8": torch.int8}


def error(got: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    """Relative, by the Frobenius norm."""
    assert got is not None and exact is not None
    return float(((got.double() - exact).norm() / exact.norm()).detach())


def assert_inside_bound(layer: nn.Linear, recipe: str) -> None:
    """Output and gradients of a few tokens against fp64."""
    wide = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(64, layer.in_features).to(layer.weight.dtype)
    dy = torch.randn(64, layer.out_features).to(layer.weight.dtype)
    leaves = x.clone().requires_grad_(), x.double().requires_grad_()
    y, exact = layer(leaves[0]), wide(leaves[1])
    y.backward(dy)
    exact.backward(dy.double())
    bound = RECIPE_ERROR[recipe]
    if layer.weight.dtype == torch.bfloat16:
        bound = max(bound, RECIPE_ERROR["bf16"])
    for got, want in ((y, exact), (leaves[0].grad, leaves[1].grad),
                      (layer.weight.grad, wide.weight.grad), (layer.bias.grad, wide.bias.grad)):
        assert error(got, want) < bound


def one_pass(layer: nn.Linear) -> Callable[[], object]:
    """Output, and the gradients of input, weight and bias."""
    dtype = layer.weight.dtype
    x = torch.randn(TOKENS, layer.in_features).to(dtype).requires_grad_()
    dy = torch.randn(TOKENS, layer.out_features).to(dtype)
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def least_work(recipe: lowp.Recipe, width: int, parameters: str) -> Work:
    """Input, weight, output and their gradients once each; a product of each of the three."""
    size = getattr(torch, parameters.removeprefix("torch.")).itemsize
    operations: Counter[str] = Counter()
    for field in ("output", "grad_input", "grad_weight"):
        dtype = PRODUCT_TYPES[recipe.product(field).precision]
        operations.update(product(TOKENS, width, width, dtype).operations)
    return Work(size * (4 * TOKENS * width + 2 * width * width), dict(operations))


@pytest.mark.parametrize("width", (1024, 2048, 4096))
def test_pass(rows: list[dict[str, Any]], benchmark: Any, width: int) -> None:
    """All recipes with fp32 parameters, the int8 ones with bf16 parameters too, in one run."""
    plain = {f"nn.Linear {dtype}": one_pass(nn.Linear(width, width, dtype=dtype))
             for dtype in DTYPES}
    ours: dict[str, Callable[[], object]] = {}
    labels: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        for recipe in RECIPES if dtype == torch.float32 else ("int8", "int8_full"):
            layer = lowp.Linear(width, width, dtype=dtype, precision=recipe)
            assert_inside_bound(layer, recipe)
            name = f"{recipe} {dtype}"
            ours[name] = one_pass(layer)
            labels[name] = {"op": "forward + backward", "recipe": recipe,
                            "parameters": str(dtype), "tokens": TOKENS, "width": width}
    times = interleaved({**plain, **ours}, rounds=10)
    for name, label in labels.items():
        mine = {"lowp": times[name], **{other: times[other] for other in plain}}
        work = least_work(RECIPES[label["recipe"]], width, label["parameters"])
        rows.append({**label, **with_ratios(mine, "lowp"), "work": sample(work)})
    benchmark.pedantic(ours["int8_full torch.float32"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_small_call(compare: Compare, recipe: str, grad: bool) -> None:
    """The host's share: 100 forward calls on 64 x 64, far too small for the kernels to matter."""
    layer = lowp.Linear(64, 64, precision=recipe)
    assert_inside_bound(layer, recipe)
    plain = nn.Linear(64, 64)
    x = torch.randn(64, 64)

    def calls(module: nn.Linear) -> Callable[[], object]:
        def run() -> None:
            with torch.set_grad_enabled(grad):
                for _ in range(100):
                    module(x)
        return run

    labels = {"op": "100 small calls" + (", grad" if grad else ""), "recipe": recipe,
              "parameters": "torch.float32", "tokens": 64, "width": 64}
    compare(labels, {"lowp": calls(layer), "nn.Linear torch.float32": calls(plain)}, "lowp")
