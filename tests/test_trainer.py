"""The training loop: what a step computes, what it logs, and what makes it stop."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowp.hybrid.generators import set_random_state
from lowp.hybrid.random import pass_index
from lowp.hybrid.schedule import learning_rate
from lowp.hybrid.trainer import Outcome, Trainer, WeightedObjective
from lowp.key import clock
from tests.hybrid_toys import Network, Numbers, classify, toy_trainer, without_time

pytestmark = pytest.mark.usefixtures("one_thread")


class Quadratic(nn.Module):
    """One fp32 parameter vector; losses in it have gradients known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([3.0, -4.0, 12.0]))


def square(model: nn.Module, batch: Any) -> Tensor:
    """Gradient: the point itself, of norm 13."""
    return 0.5 * model.point.square().sum()


def total(model: nn.Module, batch: Any) -> Tensor:
    """Gradient: ones."""
    return model.point.sum()


def quadratic_trainer(*terms: WeightedObjective, **options: Any) -> Trainer:
    model = Quadratic()
    chosen: dict[str, Any] = {"steps": 10, "warmup": 0.0, "clip": 1e9}
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.5), terms, Numbers(0),
                   Numbers(1), **{**chosen, **options})


def test_a_step_is_one_update_by_the_weighted_sum() -> None:
    trainer = quadratic_trainer(WeightedObjective(square, 2.0), WeightedObjective(total, 3.0))
    before = trainer.model.point.detach().clone()
    record = trainer.train_step()
    gradient = 2 * before + 3
    assert torch.equal(trainer.model.point.detach(), before - 0.5 * gradient)
    assert record["step"] == 1
    assert record["lr"] == 0.5
    assert record["loss"] == 2 * 84.5 + 3 * 11
    assert record["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert record["objectives"] == {
        "square": {"loss": 84.5, "weight": 2.0, "grad_norm": 26.0},
        "total": {"loss": 11.0, "weight": 3.0,
                  "grad_norm": pytest.approx(3 * math.sqrt(3), rel=1e-6)},
    }
    assert int(clock.step) == 2


def test_gradient_norms_are_those_of_each_objective_alone() -> None:
    """Also where weights are used several times in a forward, and gradients are 16-bit."""
    trainer = toy_trainer()
    for _ in range(5):
        twin = copy.deepcopy(trainer.model)
        streams = copy.deepcopy((trainer.labelled, trainer.unlabelled))
        noisy = copy.deepcopy(trainer.objectives[1].objective)
        state = trainer.state_dict()["random"]
        step = trainer.step + 1
        record = trainer.train_step()
        # The second run draws what the first drew: the clock and the generators are set back.
        set_random_state(state)
        clock.set(step)
        for index, (function, stream) in enumerate(
                zip((classify, noisy), streams, strict=True)):
            with pass_index(index):
                loss = function(twin, stream.next())
            weight = trainer.objectives[index].weight_at(step)
            grads = torch.autograd.grad(loss * weight, list(twin.parameters()))
            norm = math.sqrt(sum(float(g.float().square().sum()) for g in grads))
            logged = record["objectives"][trainer.objectives[index].name]
            assert logged["loss"] == float(loss.detach())
            # Both sum in fp32, here squares and there norms of few elements: n · 2^-24 apart.
            assert logged["grad_norm"] == pytest.approx(norm, rel=112 * 2**-24)
        clock.set(step + 1)


def test_the_whole_gradient_is_clipped() -> None:
    trainer = quadratic_trainer(WeightedObjective(square), clip=1.3)
    before = trainer.model.point.detach().clone()
    record = trainer.train_step()
    assert record["grad_norm"] == 13.0
    # Four fp32 roundings: of the factor, the scaled gradient, its product with lr, the result.
    assert torch.allclose(trainer.model.point, 0.95 * before, rtol=4 * 2**-24, atol=0)


def test_learning_rate_rises_then_falls_to_almost_nothing() -> None:
    rates = [learning_rate(step, 1000, 0.05) for step in range(1, 1001)]
    assert rates[:50] == [step / 50 for step in range(1, 51)]
    assert rates[50] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
    assert rates[525] == pytest.approx(0.5, abs=1 / 475)
    assert 0 < rates[-1] < 1e-5
    assert [learning_rate(1, 1, w) for w in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert learning_rate(1, 3, 0.0) == 1.0


def test_a_schedule_reaches_groups_and_tensor_rates() -> None:
    model = Quadratic()
    rate = torch.tensor(0.25, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=False, foreach=False)
    trainer = Trainer(model, optimizer, [WeightedObjective(square)], Numbers(0), steps=4,
                      warmup=0.5)
    assert [trainer.train_step()["lr"] for _ in range(4)] == [0.125, 0.25, 0.25, 0.125]


def test_a_stream_moves_once_a_step_and_only_if_it_is_read() -> None:
    both = quadratic_trainer(WeightedObjective(square), WeightedObjective(total))
    both.train_step()
    assert both.labelled.cursor == 1
    assert both.unlabelled.cursor == 0
    third = WeightedObjective(total, name="c", stream="unlabelled")
    more = quadratic_trainer(WeightedObjective(square), third)
    more.train_step()
    assert (more.labelled.cursor, more.unlabelled.cursor) == (1, 1)


def test_weight_zero_is_not_computed() -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("computed")

    late = WeightedObjective(never, lambda step: 0.0)
    record = quadratic_trainer(WeightedObjective(square), late).train_step()
    assert record["objectives"]["never"] == {"weight": 0.0}


@pytest.mark.parametrize("broken_part", ["loss nan", "loss inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken_part: str) -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        loss = model.inner.weight.float().square().sum()
        if trainer.step != 3:
            return loss
        if broken_part == "gradient":
            return loss + (model.outer.weight.float() * 0).sqrt().sum()  # its gradient is 0 · inf
        return loss * float(broken_part.removeprefix("loss "))

    trainer = toy_trainer(steps=6)
    trainer.objectives = [*trainer.objectives, WeightedObjective(broken)]
    for _ in range(3):
        assert "skipped" not in trainer.train_step()
    state = copy.deepcopy(trainer.state_dict())
    record = trainer.train_step()
    if broken_part == "gradient":
        assert record["skipped"] == "the gradient's norm is nan"
    else:
        assert record["skipped"] == broken_part.replace("loss", "the loss of broken is")
    assert "objectives" not in record
    after = trainer.state_dict()
    assert after["clock"] == state["clock"], "random bits belong to applied updates"
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, after["model"][name])
    for index, entry in state["optimizer"]["state"].items():
        for name, tensor in entry.items():
            assert torch.equal(tensor, after["optimizer"]["state"][index][name])
    assert (trainer.step, trainer.skipped, trainer.skipped_in_a_row) == (4, 1, 1)
    assert "skipped" not in trainer.train_step()
    assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 0)


def test_it_stops_after_so_many_skips_in_a_row_and_saves() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        healthy = trainer.step < 4 or trainer.step == 6
        return model.point.sum() * (1.0 if healthy else math.nan)

    saved: dict[int, Any] = {}
    records: list[Any] = []
    trainer = quadratic_trainer(
        WeightedObjective(broken), steps=100, max_skipped=3, record=records.append,
        save=lambda step, state: saved.update({step: state}))
    outcome = trainer.run()
    assert outcome == Outcome("diverged", 10, "the loss of broken is nan; broken, labelled stream: "
                              "the loss itself: every layer's output is finite")
    assert list(saved) == [10]
    assert saved[10]["skipped"] == 5
    assert torch.isfinite(saved[10]["model"]["point"]).all()
    assert sum("skipped" in record for record in records) == 5


def test_records_saves_and_evaluations_come_when_they_should() -> None:
    records: list[dict[str, Any]] = []
    saved: list[tuple[int, int]] = []
    trainer = toy_trainer(steps=13, eval_every=5, checkpoint_every=4, record=records.append,
                          save=lambda step, state: saved.append((step, len(records))))
    assert trainer.run() == Outcome("finished", 13)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 14))
    assert [r["step"] for r in records if "eval" in r] == [5, 10, 13]
    # A checkpoint comes after all records up to its step: steps and evaluations.
    assert saved == [(4, 4), (8, 9), (12, 14), (13, 16)]
    best = max(r["eval"]["accuracy"] for r in records if "eval" in r)
    assert trainer.best["accuracy"] == best
    assert trainer.run() == Outcome("finished", 13), "a finished run has no further step"


def test_two_runs_have_equal_bits() -> None:
    logs: list[list[dict[str, Any]]] = [[], []]
    models = []
    for log in logs:
        trainer = toy_trainer(steps=12, record=log.append)
        trainer.run()
        models.append(trainer.model.state_dict())
    assert without_time(logs[0]) == without_time(logs[1])
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_it_learns() -> None:
    records: list[dict[str, Any]] = []
    toy_trainer(steps=120, record=records.append).run()
    losses = [r["objectives"]["supervised"]["loss"] for r in records if "objectives" in r]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_training_mode_is_restored_after_an_evaluation() -> None:
    modes = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        modes.append(model.training)
        return classify(model, batch)

    model = Network()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1),
                      [WeightedObjective(watched)], Numbers(0), steps=3, eval_every=1,
                      evaluate=lambda m: {"accuracy": float(m.eval().training)})
    trainer.run()
    assert modes == [True, True, True]


def test_ctrl_c_ends_the_step_saves_and_restores_the_handler() -> None:
    saved: list[int] = []

    def record(entry: dict[str, Any]) -> None:
        if entry["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    trainer = toy_trainer(steps=50, record=record, checkpoint_every=100,
                          save=lambda step, state: saved.append(step))
    assert trainer.run() == Outcome("interrupted", 4)
    assert saved == [4]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_acts_at_once() -> None:
    def record(entry: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_trainer(record=record).run()


@pytest.mark.parametrize(("change", "message"), [
    ({"objectives": []}, "different names"),
    ({"objectives": [WeightedObjective(square), WeightedObjective(square)]}, "different names"),
    ({"objectives": [WeightedObjective(square, stream="unlabelled")]}, "unlabelled=None"),
    ({"steps": 0}, "at least 1"), ({"max_skipped": 0}, "at least 1"),
])
def test_options_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    model = Quadratic()
    options: dict[str, Any] = {"objectives": [WeightedObjective(square)], **change}
    with pytest.raises(ValueError, match=message):
        Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), labelled=Numbers(0), **options)


def test_objectives_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must be 'labelled' or 'unlabelled', got 'both'"):
        WeightedObjective(square, stream="both")
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="'square' must be finite and at least 0"):
            quadratic_trainer(WeightedObjective(square, weight)).train_step()
    for loss in (lambda m, b: m.point * 1, lambda m, b: torch.tensor(1.0)):
        with pytest.raises(ValueError, match="scalar loss that depends on the model"):
            quadratic_trainer(WeightedObjective(loss, name="odd")).train_step()
