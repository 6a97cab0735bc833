"""Mixing rules against values worked out by hand, and through the trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowp.hybrid.gradients import Vector, dot, norm
from lowp.hybrid.mixing import GradNorm, Uncertainty, without_conflicts
from lowp.hybrid.trainer import Trainer, WeightedObjective
from lowp.key import clock
from tests.hybrid_toys import Numbers


class Plane(nn.Module):
    """Two points; the first is shared by the losses below."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([3.0, -4.0]))
        self.own = nn.Parameter(torch.tensor([1.0, 2.0]))


def along(x: float, y: float) -> Any:
    """A loss whose gradient at the shared point is (x, y), and whose value is 10 at the start."""

    def loss(model: Plane, batch: Any) -> Tensor:
        move = model.shared - torch.tensor([3.0, -4.0])
        return 10 + (move * torch.tensor([x, y])).sum()

    return loss


def trainer_of(*terms: WeightedObjective, **options: Any) -> Trainer:
    model = Plane()
    chosen: dict[str, Any] = {"steps": 10, "warmup": 0.0, "clip": 1e9, **options}
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.5), terms, Numbers(0),
                   Numbers(1), **chosen)


def test_uncertainty_is_descent_in_log_variance() -> None:
    rule = Uncertainty(["a", "b"], lr=0.1)
    trainer = trainer_of(WeightedObjective(along(1, 0), name="a"),
                         WeightedObjective(along(0, 1), 2.0, name="b"),
                         WeightedObjective(along(1, 1), name="fixed"), mixing=rule)
    record = trainer.train_step()
    assert [t["weight"] for t in record["objectives"].values()] == [1.0, 2.0, 1.0]
    # s = 0 - 0.1 (0.5 - 10) = 0.95 for both: the losses are 10, and their weights play no part
    assert record["mixing"] == pytest.approx({"log_variance/a": 0.95, "log_variance/b": 0.95})
    record = trainer.train_step()
    factor = math.exp(-0.95)
    weights = [t["weight"] for t in record["objectives"].values()]
    assert weights == pytest.approx([factor, 2 * factor, 1.0])
    for _ in range(2000):
        rule.update({"a": 0.25, "b": 1e9}, {})
    assert rule.log_variance["a"] == pytest.approx(math.log(0.5)), "it settles at ln 2L"
    assert rule.log_variance["b"] == 4.0


def test_gradnorm_is_descent_towards_the_balance() -> None:
    rule = GradNorm(["a", "b"], alpha=1.5, lr=0.1)
    first: list[Vector] = [{0: torch.tensor([3.0, 4.0])}, {0: torch.tensor([0.0, 1.0])}]
    rule.update({"a": 2.0, "b": 8.0}, {"a": first[0], "b": first[1]})
    # G = 5 and 1, mean 3, rates 1 and 1: both targets 3; c = 1 - 0.1·5, 1 + 0.1·1, to sum 2
    assert rule.factors == pytest.approx({"a": 2 * 0.5 / 1.6, "b": 2 * 1.1 / 1.6})
    c = dict(rule.factors)
    # with these factors the norms are 5 c_a and c_b; the losses fell to 1/2 and 1/4
    scaled = {"a": {0: c["a"] * first[0][0]}, "b": {0: c["b"] * first[1][0]}}
    rule.update({"a": 1.0, "b": 2.0}, scaled)
    mean = (5 * c["a"] + c["b"]) / 2
    target = {"a": mean * (0.5 / 0.375) ** 1.5, "b": mean * (0.25 / 0.375) ** 1.5}
    assert 5 * c["a"] < target["a"] and c["b"] > 0
    a = c["a"] + 0.1 * 5
    b = c["b"] - 0.1 * math.copysign(1, c["b"] - target["b"])
    assert rule.factors == pytest.approx({"a": 2 * a / (a + b), "b": 2 * b / (a + b)})
    before = dict(rule.factors)
    rule.update({"a": 1.0}, {"a": first[0]})
    assert rule.factors == before, "one objective was not computed"


def test_gradnorm_looks_at_what_all_objectives_reach() -> None:
    def both(model: Plane, batch: Any) -> Tensor:
        return 10 + model.shared.sum() + 100 * model.own.sum()

    trainer = trainer_of(WeightedObjective(along(1, 0), name="a"),
                         WeightedObjective(both, name="b"), mixing=GradNorm(["a", "b"], lr=0.1))
    record = trainer.train_step()
    # On the shared point the norms are 1 and √2, rates 1: a rises, b falls, own is not counted.
    a, b = 1 + 0.1, 1 - 0.1 * 2**0.5
    assert record["mixing"] == pytest.approx({"factor/a": 2 * a / (a + b),
                                              "factor/b": 2 * b / (a + b)})


def test_projection_removes_what_works_against_another() -> None:
    a, b = {0: torch.tensor([1.0, 0.0])}, {0: torch.tensor([-1.0, 1.0])}
    # a - (-1/2) b = (1/2, 1/2); b - (-1/1) a = (0, 1)
    assert without_conflicts([a, b])[0].tolist() == [0.5, 1.5]
    c = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([5.0])}
    found = without_conflicts([a, c])
    assert found[0].tolist() == [2.0, 2.0] and found[1].tolist() == [5.0], "no conflict: the sum"
    assert a[0].tolist() == [1.0, 0.0], "its arguments stay"


def test_projection_goes_in_a_keyed_order() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [{0: torch.randn(3, generator=generator)} for _ in range(6)]
    found = set()
    for step in range(1, 40):
        clock.set(step)
        once = without_conflicts(gradients, seed=1)[0]
        assert torch.equal(once, without_conflicts(gradients, seed=1)[0])
        found.add(tuple(once.tolist()))
    assert len(found) > 10, "the order is another one at another step"


def test_norms_and_cosines_of_every_objective_are_logged() -> None:
    for parts in (1, 2):
        trainer = trainer_of(WeightedObjective(along(3, 4), 2.0, name="a"),
                             WeightedObjective(along(-4, 3), name="b"),
                             WeightedObjective(along(-3, -4), name="c"),
                             WeightedObjective(along(1, 1), lambda step: 0.0, name="off"),
                             separate=True, accumulate=parts)
        record = trainer.train_step()
        terms = record["objectives"]
        assert [terms[n]["grad_norm"] for n in "abc"] == [10.0, 5.0, 5.0]
        assert [terms[n]["cosine"] for n in "abc"] == pytest.approx([1.0, 0.0, -1.0])
        assert terms["off"] == {"weight": 0.0}
        assert record["grad_norm"] == pytest.approx(math.hypot(6 - 4 - 3, 8 + 3 - 4))


def test_a_step_without_conflicts_through_the_trainer() -> None:
    trainer = trainer_of(WeightedObjective(along(1, 0), name="a"),
                         WeightedObjective(along(-1, 1), name="b"), project_conflicts=True)
    trainer.train_step()
    assert trainer.model.shared.tolist() == [3.0 - 0.5 * 0.5, -4.0 - 0.5 * 1.5]
    assert trainer.model.own.tolist() == [1.0, 2.0]


def test_inner_products_and_norms() -> None:
    a: Vector = {0: torch.tensor([1.0, 2.0]), 2: torch.tensor([3.0])}
    b: Vector = {0: torch.tensor([4.0, 5.0]), 1: torch.tensor([9.0])}
    assert dot(a, b) == 14.0 and dot(a, {}) == 0.0
    assert norm(a) == pytest.approx(14**0.5, rel=2**-23) and norm({}) == 0.0
