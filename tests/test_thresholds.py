"""Adaptive thresholds against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowp.hybrid import Batch, FlexMatch, FreeMatch, PseudoLabel
from lowp.hybrid.objectives.thresholds import Labels
from tests.text_toys import CLASSES, Bag, batch_of


class Answers:
    """A model that gives these probabilities, row by sample id."""

    training = False

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = torch.tensor(rows)

    def train(self, mode: bool = True) -> None:
        pass

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.rows[tokens[:, 0]].log()


def samples(*ids: int) -> Batch:
    numbers = torch.tensor(ids)
    return Batch(numbers[:, None], torch.ones_like(numbers), None, numbers)


ROWS = [[0.97, 0.02, 0.01], [0.96, 0.02, 0.02], [0.02, 0.96, 0.02], [0.2, 0.7, 0.1],
        [0.1, 0.3, 0.6], [0.34, 0.33, 0.33]]


def test_flexmatch() -> None:
    model: Any = Answers(ROWS)
    rule = FlexMatch(classes=3, samples=6, value=0.95)
    assert rule.class_limits().tolist() == [0.0, 0.0, 0.0], "nothing is learned yet"
    assert bool(Labels(model, samples(0, 3, 5), rule).confident.all())
    assert rule.class_limits().tolist() == [0.0, 0.0, 0.0], "a step sees those before it"
    rule.end_step()
    # one of six samples was above 0.95, as class 0; five never: β = (1/5, 0, 0)
    expected = [0.2 / 1.8 * 0.95, 0.0, 0.0]
    assert rule.class_limits().tolist() == pytest.approx(expected, rel=2**-23)
    Labels(model, samples(0, 1, 2), rule)
    Labels(model, samples(3, 4, 5), rule)
    rule.end_step()
    # σ = (2, 1, 0), three never: β = (2/3, 1/3, 0)
    expected = [(2 / 3) / (4 / 3) * 0.95, (1 / 3) / (5 / 3) * 0.95, 0.0]
    assert rule.class_limits().tolist() == pytest.approx(expected, rel=2**-23)
    assert Labels(model, samples(3), rule).confident.tolist() == [True]  # 0.7 against 0.19
    rule.begin_step()
    Labels(Answers([[0.1, 0.8, 0.1]] * 6), samples(0, 1, 2), rule)  # type: ignore[arg-type]
    rule.end_step()
    assert rule.latest.tolist() == [0, 0, 1, -1, -1, -1], "below 0.95 the latest label stays"


def test_freematch() -> None:
    model: Any = Answers(ROWS)
    rule = FreeMatch(classes=3, momentum=0.5, fairness=0.0)
    first = Labels(model, samples(0, 2), rule)
    # τ = (1/3 + 0.965)/2; p̃ = (1/3 + mean)/2 of the means 0.495, 0.49, 0.015
    tau = (1 / 3 + 0.965) / 2
    p = [(1 / 3 + m) / 2 for m in (0.495, 0.49, 0.015)]
    limits = rule.limits(torch.tensor(ROWS)[[0, 2, 4]], samples(0, 2, 4))
    assert first.confident.tolist() == [True, True]
    rule.begin_step()
    again = FreeMatch(classes=3, momentum=0.5, fairness=0.0)
    Labels(model, samples(0, 2), again)
    again.end_step()
    assert again.averages[0] == pytest.approx(tau)
    assert again.averages[1:4].tolist() == pytest.approx(p)
    assert again.averages[4:].tolist() == pytest.approx([(1 / 3 + h) / 2 for h in (0.5, 0.5, 0)])
    assert rule.averages.tolist() == [1 / 3] * 7, "the step was not applied"
    assert limits.dtype == torch.float32
    # Two parts of a step move the averages as the whole does.
    for part in ((0,), (2,)):
        Labels(model, samples(*part), rule)
    rule.end_step()
    torch.testing.assert_close(rule.averages, again.averages, rtol=2**-22, atol=0)


@pytest.mark.parametrize("make", [
    lambda: FlexMatch(CLASSES, 6, 0.3), lambda: FreeMatch(CLASSES, 0.9),
])
def test_what_a_threshold_learned_is_its_state(make: Any) -> None:
    batch, model = batch_of([5, 8, 6, 7, 9, 4], labelled=False), Bag()
    objective, other = PseudoLabel(make()), PseudoLabel(make())
    for _ in range(3):
        objective.begin_step()
        objective(model, batch)
        objective.end_step(model)
    objective(model, batch)
    other.load_state_dict(objective.state_dict())  # in the middle of a step
    for one in (objective, other):
        one(model, batch)
        one.end_step(model)
    states = objective.state_dict(), other.state_dict()
    for key, value in states[0].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, states[1][key])
    assert torch.equal(objective(model, batch).loss, other(model, batch).loss)


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="state must be of 6 samples, got 7"):
        FlexMatch(3, 6).load_state_dict(FlexMatch(3, 7).state_dict())
