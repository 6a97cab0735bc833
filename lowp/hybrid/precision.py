"""The recipe that an objective's passes run by."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from lowp.recipe import Recipe


def lowp_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that run by a recipe, by qualified name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(getattr(module, "recipe", None), Recipe)}


@contextmanager
def recipe_for(model: nn.Module, recipe: Recipe | None,
               except_for: Collection[str] = ()) -> Iterator[None]:
    """Inside, every lowp layer runs by ``recipe``; ``None`` leaves each its own.

    A backward pass runs by the recipe of its forward pass, wherever it is called.

    Args:
        except_for: qualified names of layers that keep their own.
    """
    if recipe is None:
        yield
        return
    layers = [m for name, m in lowp_layers(model).items() if name not in except_for]
    before = [layer.recipe for layer in layers]
    for layer in layers:
        layer.recipe = recipe  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.recipe = own
