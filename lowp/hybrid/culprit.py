"""Where a number that is not finite came from: a pass run once more, with every layer watched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowp.hybrid.sharding import local


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every float tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif hasattr(value, "data") and isinstance(value.data, Tensor):  # a packed sequence
        yield from _tensors(value.data)


def is_finite(value: Any) -> bool:
    """Whether no float tensor in it has NaN or an infinity."""
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value))


def _bad_weight(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not is_finite(local(parameter)):
            layer, _, own = name.rpartition(".")
            return f"layer {layer or '(root)'}: its {own} is not finite"
    return ""


class _Watched:
    """Hooks on every layer; remembers the first that turned finite numbers into others.

    Args:
        both_ways: also watch the backward pass, which a model that writes into a layer's output
            does not allow.
    """

    def __init__(self, model: nn.Module, both_ways: bool) -> None:
        self.forward = self.backward = ""
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._after(name)))
            if name and both_ways:
                self._handles.append(module.register_full_backward_hook(self._back(name)))

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self.forward and is_finite(args) and not is_finite(output):
                self.forward = f"layer {name}: finite input, output not finite"

        return hook

    def _back(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            if not self.backward and is_finite(grad_output) and not is_finite(grad_input):
                self.backward = f"layer {name}: finite gradient of its output, not of its input"

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _bad_gradient(model: nn.Module, before: list[Tensor | None]) -> str:
    """The parameter whose gradient this pass made not finite; the last in the model's order.

    A backward goes from the last layer to the first, so those before it may only have inherited it.
    """
    named = list(zip(model.named_parameters(), before, strict=True))
    for (name, parameter), old in reversed(named):
        grad = parameter.grad
        if grad is not None and not is_finite(grad) and (old is None or is_finite(old)):
            return f"parameter {name}: its gradient is not finite"
    return ""


def find(model: nn.Module, batch: Any, run: Callable[[], Tensor] | None) -> str:
    """Name what makes a pass not finite, or ``""`` if it is finite.

    Weights are looked at first, then the batch, then every layer in the order of the pass, then
    every layer in the order of the backward pass. ``.grad`` is left as the backward leaves it.

    Args:
        run: the forward pass, to its loss; must repeat itself. ``None``: look no further than the
            batch.
    """
    found = _bad_weight(model)
    if not found and not is_finite(batch):
        found = "the batch itself is not finite"
    if found or run is None:
        return found
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    try:
        return _replayed(model, run, before, True)
    except RuntimeError:
        return _replayed(model, run, before, False)


def _replayed(model: nn.Module, run: Callable[[], Tensor], before: list[Tensor | None],
              both_ways: bool) -> str:
    watched = _Watched(model, both_ways)
    try:
        loss = run()
        if not is_finite(loss.detach()):
            return watched.forward or "the loss itself: every layer's output is finite"
        if watched.forward:
            return watched.forward
        with warnings.catch_warnings():  # torch's, of a first layer whose input has no gradient
            warnings.simplefilter("ignore", UserWarning)
            loss.backward()
        return watched.backward or _bad_gradient(model, before)
    finally:
        watched.remove()
