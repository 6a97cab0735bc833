"""Parts of a step, averages, early stopping, resumes in the middle, and what happens to NaN."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowp
from lowp.hybrid import CausalLM, Consistency, LSTMClassifier, MaskedLM, Supervised
from lowp.hybrid.average import WeightAverage
from lowp.hybrid.batches import Batch, Stream, collate, micro_batches
from lowp.hybrid.fallback import SqnrFallback, sqnr
from lowp.hybrid.mixing import GradNorm, Mixing, Uncertainty
from lowp.hybrid.objectives import FlexMatch, FreeMatch, MeanTeacher, PseudoLabel
from lowp.hybrid.trainer import Outcome, Trainer, WeightedObjective
from lowp.key import clock
from lowp.recipe import Operand
from tests.hybrid_toys import Network, Numbers, accuracy, classify, toy_trainer, without_time
from tests.test_resume import assert_equal_states, through_disk
from tests.text_toys import CLASSES, VOCABULARY

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count: int, labelled: bool) -> list[Any]:
    chance = random.Random(count)
    return [([3, *(chance.randrange(5, VOCABULARY) for _ in range(chance.randrange(9))), 4],
             i % CLASSES if labelled else None) for i in range(count)]


def text_trainer(steps: int = 6, is_lowp: bool = False, **options: Any) -> Trainer:
    """Three objectives that count, over streams whose epochs end in the middle of batches."""
    torch.manual_seed(0)
    clock.set(1)
    model = LSTMClassifier(VOCABULARY, CLASSES, embedding=8, hidden=8, dropout=0.2,
                           precision="int8" if is_lowp else "fp32")
    optimizer: torch.optim.Optimizer
    if is_lowp:
        model.to(torch.bfloat16)
        optimizer = lowp.optim.AdamW(model.named_parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    terms = [
        WeightedObjective(Supervised()),
        WeightedObjective(CausalLM(), 0.5),
        WeightedObjective(Consistency(FreeMatch(CLASSES, fairness=0.0))),
        WeightedObjective(MeanTeacher(), 3.0),
        WeightedObjective(PseudoLabel(FlexMatch(CLASSES, 23, 0.3))),
    ]
    return Trainer(model, optimizer, terms, Stream(texts(14, True), 8, 0, 0),
                   Stream(texts(23, False), 12, 0, 1), steps=steps, warmup=0.0, **options)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_step_as_a_whole(parts: int) -> None:
    """Counts of tokens and texts differ from part to part, so a mean of means would not do."""
    logs: list[list[dict[str, Any]]] = [[], []]
    for log, accumulate in zip(logs, (1, parts), strict=True):
        text_trainer(record=log.append, accumulate=accumulate).run()
    for whole, divided in zip(*logs, strict=True):
        for name, term in whole["objectives"].items():
            # fp32 sums of below 200 terms of size below 4 in another order, over six steps of
            # which each passes on the last one's difference: 6 · 200 · 4 · 2^-24
            assert divided["objectives"][name]["loss"] == pytest.approx(term["loss"], abs=3e-4)
        assert divided["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_a_batch_is_parted_whatever_it_is_made_of() -> None:
    batch = collate([([3, 4], 0), ([3, 7, 4], 1), ([3], 2)], [5, 6, 7])
    first, second = micro_batches(batch, 2)
    assert isinstance(first, Batch) and first.sample_ids.tolist() == [5, 6]
    assert second.labels.tolist() == [2] and second.targets is None
    x = torch.arange(6)
    parts = micro_batches({"x": x, "inner": (x * 2, [x + 1]), "rate": 0.5}, 3)
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[2]["inner"][1][0].tolist() == [5, 6] and parts[0]["rate"] == 0.5
    assert micro_batches("anything", 1) == ["anything"]
    with pytest.raises(ValueError, match=r"at least 4 rows, got shape \(3,\)"):
        micro_batches(torch.zeros(3), 4)
    for odd in (["a", "b"], (x, ["a"]), object()):
        with pytest.raises(TypeError, match="to be parted"):
            micro_batches(odd, 2)


@pytest.mark.parametrize("options", [
    {"accumulate": 3}, {"accumulate": 3, "separate": True}, {"accumulate": 2, "is_lowp": True},
    {"accumulate": 2, "project_conflicts": True, "average": 0.9},
    {"accumulate": 3, "mixing": "gradnorm"}, {"accumulate": 1, "mixing": "uncertainty"},
])
def test_resumed_in_the_middle_of_anything_the_rest_is_the_same(
        tmp_path: Path, options: dict[str, Any]) -> None:
    """20 random parts of steps over all cases and more: through the disk, bit for bit."""

    def fresh(record: Any) -> Trainer:
        chosen = dict(options)
        if "average" in chosen:
            chosen["average"] = WeightAverage(chosen["average"])
        names = ["supervised", "causal_lm", "consistency", "mean_teacher", "pseudo_label"]
        rule = {"gradnorm": GradNorm(names), "uncertainty": Uncertainty(names[:2])}
        chosen["mixing"] = rule[chosen["mixing"]] if "mixing" in chosen else Mixing()
        return text_trainer(5, record=record, **chosen)

    whole_log: list[dict[str, Any]] = []
    whole = fresh(whole_log.append)
    total = 5 * whole.accumulate
    chance = random.Random(int.from_bytes(random.SystemRandom().randbytes(8)))
    chosen = sorted(chance.sample(range(1, total), 4))
    states: dict[int, Any] = {}
    for part in range(1, total + 1):
        record = whole.micro_step()
        if record is not None:
            whole.record(record)
        if part in chosen:
            states[part] = through_disk(whole.state_dict(), tmp_path)
    assert whole.step == 5
    for part, state in states.items():
        rest: list[dict[str, Any]] = []
        resumed = fresh(rest.append)
        clock.set(999)
        torch.rand(part)
        resumed.load_state_dict(state)
        resumed.run()
        begun = part // whole.accumulate
        assert without_time(rest) == without_time(whole_log)[begun:], f"resumed after part {part}"
        assert_equal_states(resumed.state_dict(), whole.state_dict())


def test_ctrl_c_in_the_middle_of_a_step_saves_there() -> None:
    saved: list[Any] = []
    trainer = toy_trainer(10, accumulate=4, save=lambda step, state: saved.append((step, state)))
    calls = [0]
    own = trainer.objectives[0].objective

    def interrupting(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 4 * 2 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return own(model, batch)

    trainer.objectives[0].objective = interrupting
    assert trainer.run() == Outcome("interrupted", 2)
    assert saved[-1][0] == 2 and saved[-1][1]["passes"]["done"] == 3
    whole: list[Any] = []
    toy_trainer(10, accumulate=4, record=whole.append).run()
    rest: list[Any] = []
    resumed = toy_trainer(10, accumulate=4, record=rest.append)
    resumed.load_state_dict(saved[-1][1])
    resumed.run()
    assert without_time(rest) == [r for r in without_time(whole) if r["step"] > 2]


def test_gradients_of_parts_are_added_in_fp32() -> None:
    """In bf16, 1 + 2^-9 is 1: of 63 parts with that gradient after one of 1, none would count."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    rows = torch.tensor([[1.0]] + [[2.0**-9]] * 63)

    class Rows:
        def next(self) -> Tensor:
            return rows

        def state_dict(self) -> dict[str, Any]:
            return {}

    def total(model: nn.Module, batch: Tensor) -> Tensor:
        return 64 * model(batch.bfloat16()).float().sum()

    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0),
                      [WeightedObjective(total)], Rows(), accumulate=64, clip=1e9)
    # 1 + 63 / 512 = 1.123, rounded to bf16 once
    assert trainer.train_step()["grad_norm"] == float(torch.tensor(1 + 63 / 512).bfloat16())


def test_averaged_weights_are_what_evaluations_see() -> None:
    seen: list[Tensor] = []

    def look(model: nn.Module) -> dict[str, float]:
        seen.append(model.inner.weight.detach().clone())
        return {"accuracy": 0.5}

    trainer = toy_trainer(3, average=WeightAverage(0.6), evaluate=look, eval_every=1)
    steps = [trainer.model.inner.weight.detach().float().clone()]
    own = trainer.record

    def record(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            steps.append(trainer.model.inner.weight.detach().float().clone())
        own(entry)

    trainer.record = record
    trainer.run()
    # It starts with the first update's weights; α = 1/2, then 0.6 and 0.6.
    average = steps[1]
    for weights, shown, alpha in zip(steps[1:], seen, (0.5, 0.6, 0.6), strict=True):
        average = alpha * average + (1 - alpha) * weights
        # fp32 differences of an ulp may round to the next bf16 number
        torch.testing.assert_close(shown.float(), average, rtol=2**-8, atol=0)
    assert torch.equal(trainer.model.inner.weight.detach().float(), steps[-1]), "and are put back"


def test_patience_stops_and_the_best_weights_are_kept() -> None:
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.4, 0.9])
    kept: list[Any] = []
    records: list[dict[str, Any]] = []
    trainer = toy_trainer(
        100, eval_every=2, patience=3, record=records.append,
        validate=lambda model: {"macro_f1": next(scores), "accuracy": 1.0},
        save_best=lambda step, state: kept.append((step, state["model"]["inner.weight"].clone())))
    weights: dict[int, Tensor] = {}
    trainer.evaluate = lambda model: weights.update(
        {trainer.step: model.inner.weight.detach().clone()}) or {"accuracy": 0.0}
    outcome = trainer.run()
    assert outcome == Outcome("stopped early", 10, "no better macro-F1 in 3 evaluations")
    assert [step for step, _ in kept] == [2, 4], "the first of equals stays"
    assert trainer.best["step"] == 4 and trainer.best["macro_f1"] == 0.7
    assert all(torch.equal(weights[step], kept_weights) for step, kept_weights in kept)
    assert [r["validation"]["macro_f1"] for r in records if "eval" in r] == [.5, .7, .6, .7, .4]
    assert trainer.run().status == "stopped early", "and stays so"
    with pytest.raises(ValueError, match="patience needs validate"):
        toy_trainer(patience=3)


class Poisoned:
    """A stream whose batches from one on, or one alone, hold a NaN."""

    def __init__(self, inner: Numbers, at: int, forever: bool) -> None:
        self.inner, self.at, self.forever = inner, at, forever

    def next(self) -> Any:
        x, y = self.inner.next()
        number = self.inner.cursor
        if number == self.at or (self.forever and number > self.at):
            x[3, 2] = math.nan
        return x, y

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()


class Broken(nn.Module):
    """Passes its input on, but for one step in one direction."""

    def __init__(self, trainer: Any, at: int, forwards: bool) -> None:
        super().__init__()
        self.trainer, self.at, self.forwards = [trainer], at, forwards

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer[0].step + 1 != self.at:
            return x
        if self.forwards:
            return x / 0
        x = x.clone()
        x.register_hook(lambda grad: grad * math.inf)
        return x * 1


def states_of(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    kept = {k: state[k] for k in ("model", "clock", "mixing")}
    return {**kept, "optimizer": state["optimizer"]["state"]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["labelled", "unlabelled", "forwards", "backwards", "weight"])
def test_nan_planted_anywhere_loses_nothing_and_is_named(where: str, accumulate: int) -> None:
    trainer = toy_trainer(12, is_lowp=where == "labelled", accumulate=accumulate)
    expected = {
        "labelled": "supervised, labelled stream: the batch itself is not finite",
        "unlabelled": "noisy, unlabelled stream: the batch itself is not finite",
        "forwards": "supervised, labelled stream: layer keyed.0: finite input, output not finite",
        "backwards": "supervised, labelled stream: layer keyed.0: finite gradient of its output, "
                     "not of its input",
        "weight": "supervised, labelled stream: layer outer: its bias is not finite",
    }[where]
    if where in ("labelled", "unlabelled"):
        setattr(trainer, where, Poisoned(getattr(trainer, where), 6, False))
    elif where != "weight":
        broken = Broken(trainer, 6, where == "forwards")
        trainer.model.keyed = nn.Sequential(broken, trainer.model.keyed)
    for _ in range(5):
        assert "skipped" not in trainer.train_step()
    if where == "weight":
        with torch.no_grad():
            trainer.model.outer.bias[1] = math.nan
    before = copy.deepcopy(states_of(trainer))
    record = trainer.train_step()
    assert record["culprit"] == expected
    assert "nan" in record["skipped"] or "inf" in record["skipped"]
    assert before["clock"] == 6
    assert_equal_states(before, states_of(trainer))
    if where != "weight":
        assert "skipped" not in trainer.train_step()
        assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 0)


def test_a_stream_that_stays_broken_stops_the_run_with_a_checkpoint() -> None:
    saved: dict[int, Any] = {}
    trainer = toy_trainer(50, max_skipped=3, checkpoint_every=100,
                          save=lambda step, state: saved.update({step: state}))
    trainer.unlabelled = Poisoned(Numbers(2), 6, True)
    outcome = trainer.run()
    assert outcome.status == "diverged" and outcome.step == 8 and list(saved) == [8]
    assert outcome.reason == ("the loss of noisy is nan; noisy, unlabelled stream: "
                              "the batch itself is not finite")
    resumed = toy_trainer(50)
    resumed.load_state_dict(saved[8])
    assert "skipped" not in resumed.train_step(), "with a mended stream it goes on"


def test_finding_the_culprit_changes_nothing_that_follows(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is run once more draws again what it drew, and what it counted is put back."""
    logs: list[list[dict[str, Any]]] = [[], []]
    for log in logs:
        trainer = toy_trainer(9, record=log.append)
        noisy = trainer.objectives[1]
        noisy.weight = lambda step: 1.0
        trainer.unlabelled = Poisoned(Numbers(2), 5, False)
        trainer.run()
        monkeypatch.setattr("lowp.hybrid.passes.Passes.culprit", lambda self: "")
    assert logs[0][4].pop("culprit") == "noisy, unlabelled stream: the batch itself is not finite"
    assert "skipped" in logs[0][4] and without_time(logs[0]) == without_time(logs[1])


def test_sqnr_is_that_of_the_codes() -> None:
    x = torch.randn(64, 256)
    amax = x.abs().amax(1, keepdim=True)
    codes = (x * (127 / amax)).round().clamp(-127, 127) * (amax / 127)
    expected = 10 * math.log10(float(x.square().sum() / (x - codes).square().sum()))
    assert sqnr(x, Operand()) == pytest.approx(expected, abs=1e-4) and 41 < expected < 45
    assert sqnr(torch.zeros(3, 4), Operand()) == math.inf
    x[0, 0] = 1e4
    assert sqnr(x, Operand("tensor")) < 40


def test_a_layer_under_the_limit_runs_in_bf16_for_a_while_and_says_so() -> None:
    """Row-wise codes have about 42 dB: under 1000, not under 20."""
    records: list[dict[str, Any]] = []
    saved: dict[int, Any] = {}

    def trainer_of(limit: float, record: Any) -> Trainer:
        return toy_trainer(9, True, fallback=SqnrFallback(limit, every=2, steps=3), record=record,
                           evaluate=None, checkpoint_every=1,
                           save=lambda step, state: saved.setdefault(step, copy.deepcopy(state)))

    trainer = trainer_of(1000.0, records.append)
    names: list[str] = []
    trainer.model.outer.register_forward_hook(lambda m, a, o: names.append(m.recipe.name))
    trainer.run()
    events = {r["step"]: r["fallback"] for r in records if "fallback" in r}
    # Measured at step 2, in bf16 from 3 to 5, back and measured again at step 6, bf16 from 7 on.
    assert list(events) == [2, 6]
    for step, until in ((2, 5), (6, 9)):
        lost = {e["layer"]: e for e in events[step] if "sqnr" in e}
        assert set(lost) == {"inner", "outer"}
        for event in lost.values():
            assert event["until"] == until and event["recipe"] == "bf16"
            assert 35 < event["sqnr"] < 60 and event["operand"] in ("x", "w", "dy")
    assert {"layer": "outer", "recipe": "int8_full"} in events[6]
    by_step = [names[3 * step] for step in range(9)]  # of three passes a step
    assert by_step == ["int8_full"] * 2 + ["bf16"] * 3 + ["int8_full"] + ["bf16"] * 3
    rest: list[dict[str, Any]] = []
    resumed = trainer_of(1000.0, rest.append)
    resumed.load_state_dict(saved[3])
    resumed.run()
    assert without_time(rest) == [r for r in without_time(records) if r["step"] > 3]
    calm: list[dict[str, Any]] = []
    trainer_of(20.0, calm.append).run()
    assert not any("fallback" in r for r in calm)


def test_a_pair_of_objectives_that_mask_and_count(tmp_path: Path) -> None:
    """Masked tokens are counted before the pass that hides them: the same ones."""
    batch = collate(texts(6, False), range(6))
    objective = MaskedLM(0.4)
    _, chosen = objective.corrupt(batch, VOCABULARY)
    assert objective.count(batch) == int(chosen.sum()) > 0


def test_options_of_the_loop_that_do_not_fit() -> None:
    for options in ({"accumulate": 0}, {"patience": 0, "validate": accuracy}):
        with pytest.raises(ValueError, match="must be at least 1"):
            toy_trainer(**options)
    for make, message in ((lambda: SqnrFallback(math.nan), "finite limit"),
                          (lambda: SqnrFallback(20, every=0), "every >= 1"),
                          (lambda: WeightAverage(1.0), "decay must be in")):
        with pytest.raises(ValueError, match=message):
            make()
    trainer = Trainer(Network(), torch.optim.SGD(Network().parameters(), lr=1.0),
                      [WeightedObjective(classify)], Numbers(0), accumulate=9)
    with pytest.raises(ValueError, match="at least 9 rows"):
        trainer.train_step()
