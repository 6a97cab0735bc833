"""transformers' experts, whose weights are slices of 3-D parameters, by a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowp.key import Key, tensor_id
from lowp.linear import linear
from lowp.recipe import Recipe


def refusal(module: nn.Module) -> str | None:
    """Why :func:`lowp.convert` leaves a module of experts alone; ``None`` if it does not.

    The layout is what transformers' ``use_experts_implementation`` (5.0 and later) states on every
    such module: ``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``.
    """
    if getattr(module, "_is_expert_parallel", False):
        return "experts spread over several ranks"
    if not callable(getattr(module, "_apply_gate", None)):
        return "experts without the gate that transformers' interface has"
    return None


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts in 3-D parameters in transformers' layout."""
    stated = all(hasattr(module, name) for name in
                 ("num_experts", "has_gate", "has_bias", "is_transposed", "down_proj"))
    return stated and isinstance(module.down_proj, Tensor) and module.down_proj.dim() == 3


class Experts(nn.Module):
    """Mixed into the class of a converted module: two products for each expert that has tokens.

    A token's outputs are added up in the order of the experts. Parameters stay as they are.
    """

    recipe: Recipe
    noise_ids: dict[str, list[int]]

    def adopt(self, recipe: Recipe, name: str) -> None:
        """Set what the module's own class does not have; slice e of a parameter is a tensor."""
        self.recipe = recipe
        count = self.get_parameter("down_proj").shape[0]
        self.noise_ids = {
            part: [tensor_id(f"{name}.{part}.{e}" if name else f"{part}.{e}") for e in range(count)]
            for part in ("up", "down")
        }

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] of tokens [T, H], the experts of each, int64 [T, k], and their weights [T, k]."""
        module: Any = self
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = self._slices(up_name), self._slices("down_proj")
        total = torch.zeros_like(hidden_states)
        for e in range(len(up)):
            token, place = torch.where(top_k_index == e)
            if token.numel() == 0:
                continue
            inner = self._product(hidden_states[token], up[e], "up", e)
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            y = self._product(inner, down[e], "down", e)
            if getattr(module, "has_post_expert_norm", False):
                y = module.post_expert_norm(y)
            y = y * top_k_weights[token, place, None]
            total = total.index_add(0, token, y.to(total.dtype))
        return total

    def _slices(self, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """Weight [out, in] and bias [out] of every expert; one backward for them all."""
        module: Any = self
        weights = getattr(module, name)
        if module.is_transposed:
            weights = weights.transpose(1, 2)
        biases = getattr(module, f"{name}_bias").unbind(0) if module.has_bias else \
            [None] * len(weights)
        return list(zip(weights.unbind(0), biases, strict=True))

    def _product(self, x: Tensor, of: tuple[Tensor, Tensor | None], part: str, e: int) -> Tensor:
        key = Key(self.recipe.seed, None, self.noise_ids[part][e])
        return linear(x, of[0], of[1], "none", self.recipe, key=key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__

    def extra_repr(self) -> str:
        """The precision."""
        return f"precision={self.recipe.name}"


_converted: dict[str, type[nn.Module]] = {}


def converted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a converted module of class ``kind`` gets."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in _converted:
        _converted[name] = type(kind.__name__, (Experts, kind), {"__module__": __name__})
    return _converted[name]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A module for ``copy`` and ``pickle`` to fill, since its class is made at run time."""
    made = converted(kind)
    module: nn.Module = made.__new__(made)
    return module
