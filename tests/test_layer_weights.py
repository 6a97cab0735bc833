"""lowp.Linear multiplies by whatever its weight and bias are, as nn.Linear does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import lowp
from tests.tensors import same_bits


def without_bias(layer: nn.Linear) -> None:
    layer.bias = None


def with_a_plain_weight(layer: nn.Linear) -> None:
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight


@pytest.mark.parametrize("change", (
    parametrizations.weight_norm, parametrizations.orthogonal, spectral_norm, without_bias,
    with_a_plain_weight, lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    lambda layer: prune.random_unstructured(layer, "bias", 0.5),
))
def test_weights_that_something_else_makes(change):
    layer, plain = lowp.Linear(8, 6).eval(), nn.Linear(8, 6).eval()
    plain.load_state_dict(layer.state_dict())
    for module in (layer, plain):
        torch.manual_seed(1)
        change(module)
    x = torch.randn(5, 8)
    assert same_bits(layer(x), plain(x))
    given = {name: torch.rand_like(p) for name, p in plain.named_parameters()}
    both = [torch.func.functional_call(module, given, x) for module in (layer, plain)]
    assert same_bits(*both)
