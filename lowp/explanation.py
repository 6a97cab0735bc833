"""Which kernel a layer's products run on, and why the others were refused."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lowp.backend import choose
from lowp.measured import Problem
from lowp.ops.library import OPS
from lowp.recipe import Recipe

_OPS = {  # product -> (ops of the 16-bit or fp32 path, ops of the int8 path)
    "output": (("linear",), ("quantize", "scaled_mm")),
    "grad_input": (("linear_dgrad",), ("quantize", "scaled_mm")),
    "grad_weight": (("linear_wgrad",), ("quantize", "scaled_mm")),
}


class OpChoice(NamedTuple):
    """One op of one product: its precision, the backend that runs it, and who was refused why."""

    product: str
    op: str
    precision: str
    backend: str
    refused: list[tuple[str, str]]

    def __str__(self) -> str:
        line = f"{self.product:12}{self.op:14}{self.precision:6}{self.backend}"
        return line + "".join(f"\n{'':12}refused {name}: {why}" for name, why in self.refused)


class Explanation(list[OpChoice]):
    """The choices of a layer's three products; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def explain(layer: nn.Module, x: Tensor) -> Explanation:
    """The backend of every op that ``layer(x)`` and its backward run.

    Args:
        layer: a :class:`lowp.Linear`, or a converted ``Conv1D``.
        x: an input for it; its device counts, and its size where one was measured.

    Raises:
        TypeError: ``layer`` is not a lowp layer.
    """
    recipe = getattr(layer, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"lowp.explain: expected a lowp layer, got {type(layer).__name__}")
    found = Explanation()
    for field, (float_ops, int8_ops) in _OPS.items():
        product = recipe.product(field)
        sizes = _sizes(layer, x, field)
        problem = None if sizes is None else Problem(product.precision, sizes)
        for name in int8_ops if product.is_int8 else float_ops:
            choice = choose(name, x.device, OPS[name].kernels, problem)
            found.append(OpChoice(field, name, product.precision, choice.name, choice.refused))
    return found


def _sizes(layer: nn.Module, x: Tensor, field: str) -> tuple[int, int, int] | None:
    """M, N and K of a layer's product; ``None`` without one matrix of weights."""
    weight, cols = getattr(layer, "weight", None), x.shape[-1]
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    rows, out = x.shape[:-1].numel(), weight.numel() // max(1, cols)
    return {"output": (rows, out, cols), "grad_input": (rows, cols, out),
            "grad_weight": (out, cols, rows)}[field]
