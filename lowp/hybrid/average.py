"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowp.hybrid.sharding import is_sharded

Result = TypeVar("Result")


class _Call(nn.Module):
    """Runs a function of a model as a forward pass, so that its weights can be others for once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


class WeightAverage:
    """``θ̄_t = α_t θ̄_{t-1} + (1 - α_t) θ_t``, ``α_t = min(decay, 1 - 1/(t+1))``, in fp32.

    Tarvainen and Valpola, "Mean teachers", NeurIPS 2017, section 2 and appendix B: early on it is
    the plain mean, so the first weights are soon forgotten. In 16 bits it would stand still, since
    ``(1 - α)`` of a difference is lost to rounding. Starts with the weights that it first sees.
    Buffers are the model's own.

    Args:
        decay: α in [0, 1).

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"lowp.hybrid.WeightAverage: decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {}
        self._cast: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Take the model's weights, unless there are some already.

        Raises:
            ValueError: they are sharded.
        """
        if is_sharded(list(model.parameters())):
            raise ValueError("lowp.hybrid.WeightAverage: expected weights that every rank has "
                             "whole, got sharded ones, which a pass gathers again as they are")
        if not self.weights:
            self.weights = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights."""
        self.start(model)
        self.updates += 1
        alpha = min(self.decay, 1 - 1 / (self.updates + 1))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter.detach().float(), 1 - alpha)
        self._cast = {}

    @torch.no_grad()
    def call(self, model: nn.Module, function: Callable[[Any], Result]) -> Result:
        """``function(model)`` without gradients, the model having the averaged weights meanwhile.

        They are rounded to nearest, to the types of the model's own.
        """
        self.start(model)
        if not self._cast:
            self._cast = {
                f"model.{name}": self.weights[name].to(parameter.dtype)
                for name, parameter in model.named_parameters()
            }
        result: Result = torch.func.functional_call(_Call(model), self._cast, (function,))
        return result

    def rounded(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state with the averaged weights in place of its own, in its types."""
        state = model.state_dict()
        return {n: self.weights[n].to(t.dtype) if n in self.weights else t
                for n, t in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """The averages and how often they moved."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.updates = state["updates"]
        self.weights = {n: w.detach().clone() for n, w in state["weights"].items()}
        self._cast = {}
