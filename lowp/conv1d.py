"""transformers' Conv1D (a linear layer with its weight stored [in, out]) by a recipe."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D as _Conv1D

from lowp.key import Key, tensor_id
from lowp.linear import linear
from lowp.recipe import Recipe


class Conv1D(_Conv1D):
    """What :func:`lowp.convert` makes of a ``Conv1D``: same parameters, products by a recipe."""

    recipe: Recipe
    noise_id: int

    def adopt(self, recipe: Recipe, name: str) -> None:
        """Set what a ``Conv1D`` does not have."""
        self.recipe, self.noise_id = recipe, tensor_id(name)

    def forward(self, x: Tensor) -> Tensor:
        """``x weight + bias``, [..., in] to [..., out]."""
        key = Key(self.recipe.seed, None, self.noise_id)
        return linear(x, self.weight.t(), self.bias, "none", self.recipe, key=key)
