"""Codes that passes share are those that each would have made, and never stale."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowp
from lowp.hybrid.precision import recipe_for
from lowp.hybrid.trainer import WeightedObjective
from lowp.key import clock
from lowp.linear import Linear
from lowp.recipe import Operand, Product, Recipe, recipe_of
from lowp.weight_codes import WeightCodes, shared_weight_codes
from tests.hybrid_toys import toy_trainer, without_time

BY_ROW, BY_TENSOR = (
    Recipe(output=Product("int8", Operand(), Operand(rounding="stochastic")),
           grad_input=Product("int8", Operand(), Operand(granularity, "stochastic")),
           grad_weight="bf16")
    for granularity in ("row", "tensor"))


def passes(layer: nn.Module, count: int = 3) -> list[Tensor]:
    """Outputs and gradients of some passes."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        x = torch.randn(5, layer.in_features, generator=generator).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, layer.weight.grad.clone()]
    return found


@pytest.mark.parametrize(("recipe", "readings"),
                         [("int8", 1), ("int8_full", 1), (BY_ROW, 1), (BY_TENSOR, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_codes_have_the_same_bits(recipe: Any, readings: int, dtype: torch.dtype) -> None:
    layer = Linear(24, 16, precision=recipe, name="layer")
    layer.weight.data = layer.weight.data.to(dtype).float()
    expected = passes(layer)
    with shared_weight_codes() as store:
        found = passes(layer)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert store.made == readings, "codes by row and by column come from one reading"


EDITS: list[tuple[str, Callable[[Linear, torch.optim.Optimizer], object]]] = [
    ("no_grad in place", lambda w, o: w.weight.mul_(1.5)),
    ("indexed", lambda w, o: w.weight[0].zero_()),
    ("loaded", lambda w, o: w.load_state_dict({k: v * 2 for k, v in w.state_dict().items()})),
    ("replaced data", lambda w, o: setattr(w.weight, "data", w.weight.data * 2)),
    ("replaced parameter", lambda w, o: setattr(w, "weight", nn.Parameter(w.weight.detach() * 2))),
    ("initialized", lambda w, o: w.reset_parameters()),
    ("torch's optimizer", lambda w, o: o.step()),
]


@pytest.mark.parametrize("edit", [edit for _, edit in EDITS], ids=[name for name, _ in EDITS])
def test_an_edited_weight_is_quantized_again(edit: Callable[..., object]) -> None:
    layer = Linear(24, 16, precision="int8", name="layer")
    twin = copy.deepcopy(layer)
    state = torch.get_rng_state()
    results = []
    for one, context in ((layer, shared_weight_codes()), (twin, contextlib.nullcontext())):
        torch.set_rng_state(state)
        clock.set(1)
        optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
        with context:
            before = passes(one, 1)
            with torch.no_grad():
                edit(one, optimizer)
            results.append((before, passes(one, 1)))
    (before, after), (_, expected) = results
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))


@pytest.mark.parametrize("kind", [lowp.optim.AdamW, lowp.optim.SGD])
def test_after_lowps_own_optimizers_nothing_is_stale(kind: Any) -> None:
    """Their kernels write by address."""
    curves = []
    for shared in (True, False):
        torch.manual_seed(0)
        clock.set(1)
        layer = Linear(24, 16, precision="int8", name="layer")
        optimizer = kind(layer.named_parameters(), lr=0.1)
        store, curve = WeightCodes(), []
        for _ in range(4):
            if shared:
                with shared_weight_codes(store):
                    curve += passes(layer, 2)
            else:
                curve += passes(layer, 2)
            optimizer.step()
        curves.append(curve)
        assert store.made == (4 if shared else 0)
    assert all(torch.equal(a, b) for a, b in zip(*curves, strict=True))


def test_a_weight_that_the_backward_pass_updates_is_quantized_again() -> None:
    """Between two objectives of one step, by gradient release, while the clock stands."""
    results = []
    for context in (shared_weight_codes(), contextlib.nullcontext()):
        torch.manual_seed(0)
        layer = Linear(24, 16, precision="int8", name="layer")
        lowp.optim.GradientRelease(lowp.optim.SGD(layer.named_parameters(), lr=0.1))
        with context:
            for x in torch.randn(3, 5, 24):
                layer(x).square().sum().backward()
                results.append(layer(x).detach())
    assert all(map(torch.equal, results[:3], results[3:]))


def test_stochastic_codes_are_not_taken_from_another_key() -> None:
    layer = Linear(24, 16, precision=BY_ROW, name="layer")
    x = torch.randn(5, 24)
    with shared_weight_codes() as store, torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and store.made == 1
        layer.noise_id += 1
        other = layer(x)
        assert store.made == 2 and not torch.equal(other, first)
    with torch.no_grad():
        assert torch.equal(layer(x), other)


def test_outside_nothing_is_kept_and_a_layer_carries_nothing() -> None:
    layer = Linear(24, 16, precision="int8", name="layer")
    with shared_weight_codes() as store:
        passes(layer, 1)
        assert set(layer.state_dict()) == {"weight", "bias"}
        pickle.loads(pickle.dumps(layer))
        copied = copy.deepcopy(layer)
        with torch.no_grad():
            copied.weight.mul_(2)
        assert not torch.equal(copied(torch.ones(1, 24)), layer(torch.ones(1, 24)))
    made = store.made
    expected = layer(torch.ones(1, 24)).detach()
    layer.weight.data.mul_(2)  # unseen by version counters, and allowed out here
    assert not torch.equal(layer(torch.ones(1, 24)), expected)
    assert store.made == made
    del layer, copied
    assert len(store.held) == 0, "codes go with their weight"


def test_a_run_has_the_same_bits_with_and_without() -> None:
    logs: list[list[dict[str, Any]]] = [[], []]
    for log, share in zip(logs, (True, False), strict=True):
        toy_trainer(8, True, record=log.append, share_weight_codes=share, accumulate=2).run()
    assert without_time(logs[0]) == without_time(logs[1])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of the first layer
def test_each_objective_runs_by_its_own_recipe() -> None:
    seen: list[tuple[str, str]] = []
    trainer = toy_trainer(4, True)
    inner = trainer.model.inner
    inner.register_forward_hook(lambda m, a, o: seen.append((running[-1], m.recipe.name)))
    inner.register_full_backward_hook(lambda m, a, o: seen.append((running[-1], m.recipe.name)))
    running: list[str] = []

    def watched(own: Any, name: str) -> Callable[[Any, Any], Any]:
        def objective(model: Any, batch: Any) -> Any:
            running.append(name)
            return own(model, batch)

        return objective

    for term, recipe in zip(trainer.objectives, (recipe_of("bf16"), None), strict=True):
        term.objective, term.recipe = watched(term.objective, term.name), recipe
    trainer.train_step()
    assert seen == [("supervised", "bf16")] * 2 + [("noisy", "int8_full")] * 4
    assert inner.recipe.name == "int8_full"


def test_a_recipe_for_once() -> None:
    model = lowp.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), "int8")
    x = torch.randn(3, 8)
    inside = lowp.convert(copy.deepcopy(model), "bf16")
    expected = inside(x)
    expected.sum().backward()
    with recipe_for(model, recipe_of("bf16")):
        y = model(x)
    y.sum().backward()  # outside, and by the recipe of the forward pass all the same
    assert torch.equal(y, expected) and model[0].recipe.name == "int8"
    assert torch.equal(model[0].weight.grad, inside[0].weight.grad)
    with recipe_for(model, recipe_of("bf16"), {"2"}):
        assert (model[0].recipe.name, model[2].recipe.name) == ("bf16", "int8")
    with pytest.raises(RuntimeError), recipe_for(model, recipe_of("fp32")):
        raise RuntimeError
    assert model[0].recipe.name == "int8"
    with pytest.raises(ValueError, match="precision must be one of"):
        WeightedObjective(lambda m, b: None, recipe="int4")
