"""Layers whose int8 operands lose too much run in bf16 for a while."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowp.hybrid import ranks
from lowp.hybrid.precision import lowp_layers
from lowp.quantized import dequantize, quantize
from lowp.recipe import Operand, Recipe, recipe_of

OPERANDS = ("x", "w", "dy")


def sqnr(x: Tensor, operand: Operand) -> float:
    """``10 log10(Σ x² / Σ (x - x̂)²)`` in dB, x̂ being the int8 codes of x read back; of zeros, inf.

    Row-wise codes of normal numbers have about 42 dB. Rounding is to nearest, of which the error of
    stochastic rounding has about 3 dB less.
    """
    x = x.detach().reshape(-1, x.shape[-1]).float()
    error = (x - dequantize(quantize(x, operand.granularity))).square().sum(dtype=torch.float64)
    signal = x.square().sum(dtype=torch.float64)
    if not bool(error > 0):  # NaN is the guard's own affair, not a matter of precision
        return math.inf
    return 10 * math.log10(float(signal / error))


class SqnrFallback:
    """Every so many steps, the SQNR of each int8 layer's operands over the step's passes.

    A layer of which one is under the limit runs by the recipe ``bf16`` for some steps, whatever its
    own or an objective's recipe says, and then by its own again. Ranks decide by the least of all.

    Args:
        limit: in dB.
        every: steps between measurements; 10 by default. A measurement costs about as much as the
            quantization of the operands.
        steps: how long a layer stays in bf16; 100 by default.

    Raises:
        ValueError: a limit that is not finite, or a number of steps below 1.
    """

    def __init__(self, limit: float, every: int = 10, steps: int = 100) -> None:
        if not math.isfinite(limit) or every < 1 or steps < 1:
            raise ValueError("lowp.hybrid.SqnrFallback: expected a finite limit, every >= 1 and "
                             f"steps >= 1, got {limit}, {every} and {steps}")
        self.limit, self.every, self.steps = limit, every, steps
        self.until: dict[str, int] = {}
        self._own: dict[str, Recipe] = {}
        self._handles: list[Any] = []
        self._least: dict[tuple[str, str], float] = {}

    def begin(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Set the layers' recipes for a step, and measure if it is time.

        Returns:
            An event for each layer that is back at its own recipe.
        """
        self.discard()
        layers = lowp_layers(model)
        for name in self.until:
            if name not in self._own:
                self._own[name] = layers[name].recipe  # type: ignore[assignment]
                layers[name].recipe = recipe_of("bf16")  # type: ignore[assignment]
        back = [name for name, last in self.until.items() if last < step]
        for name in back:
            del self.until[name]
            layers[name].recipe = self._own.pop(name)  # type: ignore[assignment]
        if step % self.every == 0:
            for name, layer in layers.items():
                if hasattr(layer, "weight"):  # not an LSTM or experts, which have several
                    self._watch(name, layer)
        return [{"layer": name, "recipe": layers[name].recipe.name}  # type: ignore[union-attr]
                for name in back]

    def _watch(self, name: str, layer: nn.Module) -> None:
        def forward(module: Any, args: tuple[Any, ...]) -> None:
            output = module.recipe.product("output")
            if torch.is_grad_enabled() and output.is_int8:
                self._note(name, "x", args[0], output.left)
                self._note(name, "w", module.weight, output.right)

        def after(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            product = module.recipe.product("grad_input")
            if product.is_int8 and output.requires_grad:
                output.register_hook(lambda grad: self._note(name, "dy", grad, product.left))

        self._handles.append(layer.register_forward_pre_hook(forward))
        self._handles.append(layer.register_forward_hook(after))

    def _note(self, name: str, operand: str, x: Tensor, how: Operand) -> None:
        if x.numel():
            key = (name, operand)
            self._least[key] = min(self._least.get(key, math.inf), sqnr(x, how))

    def finish(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """End a step's measurement; layers under the limit change with the next step.

        Returns:
            An event for each: layer, operand, sqnr, and the last step in bf16.
        """
        if not self._handles:
            return []
        least = self._over_ranks(model)
        self.discard()
        events = []
        for (name, operand), value in least.items():
            if value < self.limit and name not in self.until:
                self.until[name] = step + self.steps
                events.append({"layer": name, "recipe": "bf16", "operand": operand, "sqnr": value,
                               "until": self.until[name]})
        return events

    def _over_ranks(self, model: nn.Module) -> dict[tuple[str, str], float]:
        if not ranks.is_parallel():
            return dict(self._least)
        keys = [(name, operand) for name in lowp_layers(model) for operand in OPERANDS]
        own = torch.tensor([[self._least.get(key, math.inf) for key in keys]])
        device = next(model.parameters()).device
        least = ranks.gathered(own.to(device)).amin(0).tolist()
        return {key: value for key, value in zip(keys, least, strict=True) if value < math.inf}

    def discard(self) -> None:
        """Drop a measurement."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._least = [], {}

    def state_dict(self) -> dict[str, Any]:
        """Which layers are in bf16, and until when; and what the step has measured so far."""
        return {"until": dict(self.until), "least": dict(self._least)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the layers change with the next step."""
        self.until, self._least = dict(state["until"]), dict(state["least"])
