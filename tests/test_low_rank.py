"""LowRankLinear, factorize and merge: errors as the singular values say, factors by a recipe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowp
from lowp.low_rank import rank_for, svd
from tests.tensors import same_bits
from tests.tolerances import RECIPE_ERROR, chain_error


def weight_of_rank(rows: int, cols: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, cols) / rank**0.5


@pytest.mark.parametrize("recipe", RECIPE_ERROR)
def test_layer_against_fp64(recipe: str) -> None:
    layer = lowp.LowRankLinear(256, 192, 32, precision=recipe, activation="gelu", name="layer")
    plain = nn.Linear(256, 192).double()
    with torch.no_grad():
        plain.weight.copy_(layer.left.weight.double() @ layer.right.weight.double())
        plain.bias.copy_(layer.bias)
    x = torch.randn(3, 80, 256, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, exact = layer(x), nn.functional.gelu(plain(wide))
    dy = torch.randn_like(y)
    y.backward(dy)
    exact.backward(dy.double())
    bound = 2.5 * chain_error(recipe, 2)  # 2.5 for the activation's slope, as in test_layer
    for got, want in ((y, exact), (x.grad, wide.grad), (layer.left.bias.grad, plain.bias.grad),
                      (layer.left.weight.grad @ layer.right.weight.detach(),
                       plain.weight.grad @ (layer.right.weight.T @ layer.right.weight).double())):
        assert float((got.double() - want).norm() / want.norm()) < bound


def test_fresh_layer_has_the_variance_of_nn_linear() -> None:
    layer = lowp.LowRankLinear(512, 512, 64)
    assert float(layer.weight.var()) == pytest.approx(1 / (3 * 512), rel=0.1)
    assert layer.weight.requires_grad and "rank=64" in repr(layer)
    assert lowp.LowRankLinear(8, 8, 2, bias=False).bias is None
    assert lowp.LowRankLinear(8, 8, 2, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"rank must be from 1 to 8, got {rank}"):
            lowp.LowRankLinear(8, 16, rank)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (7, 7), (1, 5)])
def test_svd_signs_do_not_depend_on_the_way_there(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    u, s, vt = svd(w)
    torch.testing.assert_close(u * s @ vt, w.double())
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    mirrored, _, turned = svd(-w)
    torch.testing.assert_close(mirrored, u)
    torch.testing.assert_close(turned, -vt)


def test_error_is_that_of_the_dropped_singular_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96, bias=False))
    values = [torch.linalg.svdvals(model[i].weight.detach().double()) for i in (0, 2)]
    found = lowp.factorize(model, rank=16)
    assert found.model is model and [type(m).__name__ for m in model] == [
        "LowRankLinear", "ReLU", "LowRankLinear"]
    for entry, s in zip(found.layers, values, strict=True):
        want = float(s[16:].norm() / s.norm())
        # The factors are stored in fp32: two roundings of half an ulp, far below what was dropped.
        assert entry.error == pytest.approx(want, rel=1e-6)
        assert entry.rank == 16 and entry.parameters_after == 16 * 160 < entry.parameters_before
    assert "rank 16, error 0." in str(found) and model[0].bias is not None


def test_energy_chooses_ranks() -> None:
    layers = [nn.Linear(96, 64) for _ in range(2)]
    with torch.no_grad():
        layers[0].weight.copy_(weight_of_rank(64, 96, 5))
    found = lowp.factorize(nn.Sequential(*layers), energy=0.999999)
    low, full = found.layers
    assert low.factorized and low.rank == 5 and low.error < 1e-3
    assert not full.factorized and "would have" in full.reason and full.error == 0
    s = torch.tensor([3.0, 4.0, 0.0]).sort(descending=True).values
    assert [rank_for(s, e) for e in (0.1, 16 / 25, 0.65, 1.0)] == [1, 1, 2, 2]
    assert rank_for(torch.zeros(3), 0.9) == 1


def test_equal_weights_have_equal_factors_and_recipes_stay() -> None:
    model = lowp.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "int8")
    model[0].weight.requires_grad_(False)
    other = copy.deepcopy(model)
    first, second = (lowp.factorize(m, rank=8).model for m in (model, other))
    x = torch.randn(5, 64)
    assert same_bits(first(x), second(x))
    assert first[0].left.recipe.name == "int8" and first[0].right.recipe.name == "int8"
    assert not first[0].right.weight.requires_grad and first[1].right.weight.requires_grad
    assert "scaled_mm" in str(lowp.explain(first[0], x))
    lowp.convert(first, "bf16")
    assert first[0].left.recipe.name == "bf16" and first[0].recipe.name == "bf16"
    assert lowp.factorize(nn.Linear(64, 64), rank=4, precision="int8").model.recipe.name == "int8"


def test_merge_gives_the_layers_back() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    with torch.no_grad():
        model[0].weight.copy_(weight_of_rank(48, 64, 4))
    before = copy.deepcopy(model)
    x = torch.randn(9, 64)
    lowp.factorize(model, rank=4, filter_fn=lambda m, fqn: fqn == "0")
    assert lowp.merge(model) is model and type(model[0]) is nn.Linear
    assert list(model.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(model[0](x), before[0](x), rtol=1e-4, atol=1e-4)
    fused = lowp.LowRankLinear(8, 8, 2, activation="relu", precision="int8")
    merged = lowp.merge(fused)
    assert type(merged) is lowp.Linear and merged.activation == "relu"
    assert merged.recipe.name == "int8"
    reverted = lowp.revert(lowp.factorize(lowp.convert(before, "int8"), rank=4).model)
    assert type(lowp.merge(reverted)[0]) is nn.Linear


def test_gpt2_there_and_back() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)).eval()
    tokens = torch.randint(0, 64, (2, 12))
    keys, want = list(model.state_dict()), model(tokens).logits
    found = lowp.factorize(model, energy=1 - 1e-9, precision="bf16")
    assert not any(e.factorized for e in found.layers if e.fqn != "lm_head")
    found = lowp.factorize(model, rank=16)
    kept = {e.fqn: e.reason for e in found.layers if not e.factorized}
    assert list(kept) == ["lm_head"] and "head" in kept["lm_head"]
    low = model(tokens).logits
    lowp.merge(model)
    assert list(model.state_dict()) == keys
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(model(tokens).logits, low, rtol=1e-4, atol=1e-5)
    assert not same_bits(low, want)


def test_errors_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for options, message in (({}, "got neither"), ({"rank": 2, "energy": 0.5}, "got both"),
                             ({"rank": 0}, "at least 1, got 0"), ({"energy": 0.0}, r"in \(0, 1\]"),
                             ({"rank": 2, "precision": "int3"}, "precision must be one of")):
        with pytest.raises(ValueError, match=message):
            lowp.factorize(model, **options)
    with torch.no_grad():
        model[1].weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="layer '1' must have a finite weight, got NaN"):
        lowp.factorize(model, rank=2)
    with pytest.raises(ValueError, match="one without data"):
        lowp.factorize(nn.Linear(64, 64, device="meta"), rank=2)
    assert type(model[0]) is nn.Linear
