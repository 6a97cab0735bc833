"""The training loop: several objectives, two streams, one update a step, and an exact resume."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lowp.hybrid import ranks, sharding
from lowp.hybrid.average import WeightAverage
from lowp.hybrid.fallback import SqnrFallback
from lowp.hybrid.generators import random_state, set_random_state
from lowp.hybrid.gradients import Gradients, dot, norm
from lowp.hybrid.interruption import sigint_noted
from lowp.hybrid.mixing import Mixing, without_conflicts
from lowp.hybrid.passes import Passes, Record
from lowp.hybrid.schedule import learning_rate, set_rate
from lowp.hybrid.stopping import Best
from lowp.hybrid.term import WeightedObjective
from lowp.key import clock
from lowp.weight_codes import WeightCodes, shared_weight_codes

__all__ = ["BatchStream", "Outcome", "Record", "Trainer", "WeightedObjective"]


class BatchStream(Protocol):
    """An endless stream of batches whose whole position is its state."""

    def next(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Outcome(NamedTuple):
    """Why :meth:`Trainer.run` returned.

    ``"finished"``, ``"stopped early"``, ``"interrupted"`` or ``"diverged"``.
    """

    status: str
    step: int
    reason: str = ""


@dataclass
class Trainer:
    """Minimizes ``L = Σ_k w_k(t) · L_k``, one forward and backward for each objective.

    Gradients of the objectives accumulate, so memory is that of the largest and not of the sum.
    The whole gradient is clipped to norm ``clip`` (Pascanu et al., "On the difficulty of training
    recurrent neural networks", ICML 2013, section 3.2), then the optimizer steps once. A step whose
    loss or gradient is not finite is not applied and leaves weights, states and
    :data:`lowp.key.clock` as they were; its record names the layer, the batch or the loss at fault.

    On several ranks, and with several parts a step, an objective with a ``count`` gives the mean
    over the whole batch, so that curves are those of one rank and one part up to the order of fp32
    sums.

    Attributes:
        labelled, unlabelled: the two streams; each gives one batch a step to its objectives.
        steps: training steps of the whole run, which the learning rate's schedule spans.
        warmup: part of the steps in which the learning rate rises.
        max_skipped: consecutive steps that are not applied before the run stops.
        accumulate: parts of each batch that go through the model one after another.
        mixing: a rule that learns factors of the weights; by default none.
        project_conflicts: PCGrad, see :func:`lowp.hybrid.mixing.without_conflicts`.
        separate: keep each objective's own gradient, and log its norm and the cosine of its angle
            to the first objective's; 4 bytes a weight and objective. Some mixing needs it anyway.
        average: averaged weights, which evaluations see instead of the last ones.
        fallback: layers whose int8 operands lose too much run in bf16 for a while.
        share_weight_codes: quantize each weight once a step (:mod:`lowp.weight_codes`).
        evaluate: the model to metrics on held-out data; ``accuracy`` is what ``best`` follows.
        validate: the model to metrics on data kept for choosing the best weights by.
        patience: evaluations without a better ``macro_f1`` of ``validate`` before the run stops.
        seed: of the order in which conflicts are projected.
        record: called with each step's and evaluation's record.
        save: called with the state to be checkpointed.
        save_best: called with the state when ``validate`` gave the best macro-F1 so far.

    Raises:
        ValueError: options that do not fit each other.
    """

    model: nn.Module
    optimizer: Optimizer
    objectives: Sequence[WeightedObjective]
    labelled: BatchStream
    unlabelled: BatchStream | None = None
    steps: int = 1000
    warmup: float = 0.05
    clip: float = 1.0
    max_skipped: int = 10
    accumulate: int = 1
    mixing: Mixing = field(default_factory=Mixing)
    project_conflicts: bool = False
    separate: bool = False
    average: WeightAverage | None = None
    fallback: SqnrFallback | None = None
    share_weight_codes: bool = True
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    patience: int | None = None
    eval_every: int = 100
    checkpoint_every: int = 100
    seed: int = 0
    record: Callable[[Record], None] = lambda record: None
    save: Callable[[int, dict[str, Any]], None] = lambda step, state: None
    save_best: Callable[[int, dict[str, Any]], None] = lambda step, state: None
    step: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    skipped_in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        names = [term.name for term in self.objectives]
        if not names or len(set(names)) != len(names):
            raise ValueError("lowp.hybrid.Trainer: expected objectives of different names, "
                             f"got {names}")
        if self.unlabelled is None and any(t.stream == "unlabelled" for t in self.objectives):
            raise ValueError("lowp.hybrid.Trainer: an objective needs the unlabelled stream, "
                             "got unlabelled=None")
        if min(self.steps, self.eval_every, self.checkpoint_every, self.max_skipped,
               self.accumulate, 1 if self.patience is None else self.patience) < 1:
            raise ValueError("lowp.hybrid.Trainer: steps, eval_every, checkpoint_every, "
                             "max_skipped, accumulate and patience must be at least 1")
        if self.patience is not None and self.validate is None:
            raise ValueError("lowp.hybrid.Trainer: patience needs validate, got None")
        groups = self.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self.parameters: list[Tensor] = [p for g in groups for p in g["params"] if p.requires_grad]
        self.separate = self.separate or self.project_conflicts or self.mixing.separate
        if self.separate and sharding.is_sharded(self.parameters):
            raise ValueError("lowp.hybrid.Trainer: separate gradients, as project_conflicts and "
                             "GradNorm need them, expect whole weights, got sharded ones")
        self._gradients = Gradients(self.parameters, len(names), self.accumulate, self.separate)
        self._best = Best("accuracy" if self.validate is None else "macro_f1")
        self._codes = WeightCodes()
        self._passes: Passes | None = None
        self._seconds = 0.0

    @property
    def best(self) -> dict[str, float]:
        """The best evaluation and its step; of ``validate``, if there is one."""
        return self._best.metrics

    @property
    def _streams(self) -> dict[str, BatchStream]:
        streams = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {name: stream for name, stream in streams.items() if stream is not None}

    def _begin(self) -> Passes:
        """Start a step: its batches, learning rate and an empty gradient."""
        self.model.train()
        step = self.step + 1
        self._gradients.begin()
        for term in self.objectives:
            term.tell("begin_step")
        set_rate(self.optimizer, learning_rate(step, self.steps, self.warmup))
        self._seconds = 0.0
        passes = Passes(self.model, self.objectives, self.mixing, self.accumulate, step)
        passes.start(self._streams)
        if self.fallback is not None:
            passes.events = self.fallback.begin(self.model, step)
            passes.kept = set(self.fallback.until)
        return passes

    def micro_step(self) -> Record | None:
        """One part of a step: a forward and backward of every objective; the last part updates.

        Returns:
            ``None``, or after the last part what :meth:`train_step` returns.
        """
        start = time.perf_counter()
        if self._passes is None:
            self._passes = self._begin()
        passes = self._passes
        if self.share_weight_codes:
            with shared_weight_codes(self._codes):
                passes.run_part(self._gradients)
        else:
            passes.run_part(self._gradients)
        record = self._end(passes) if passes.is_complete else None
        self._seconds += time.perf_counter() - start
        if record is not None:
            self._passes = None
            self._codes.clear()
            record["seconds"] = self._seconds
        return record

    def _end(self, passes: Passes) -> Record:
        """Update by the sum of all parts, or skip the step."""
        trouble = passes.finish()
        record: Record = {"step": passes.step}
        if not trouble:
            trouble = self._update(passes, record)
        if self.fallback is not None:
            passes.events += self.fallback.finish(self.model, passes.step)
        if passes.events:
            record["fallback"] = passes.events
        if trouble:
            culprit = passes.culprit()
            self._gradients.begin()
            for term in self.objectives:
                term.tell("begin_step")
            self.skipped += 1
            self.skipped_in_a_row += 1
            record = {"step": passes.step, "skipped": trouble}
            if culprit:
                record["culprit"] = culprit
        else:
            self.skipped_in_a_row = 0
        self.step = passes.step
        return record

    def _update(self, passes: Passes, record: Record) -> str:
        """Combine, clip and step; why not, if the gradient is not finite."""
        gradients, terms = self._gradients, passes.terms
        gradients.reduce()
        own = {}
        if self.separate:
            own = dict(zip(terms, gradients.sums, strict=True))
            norms = {name: norm(vector) for name, vector in own.items()}
            first = next(iter(own))
            for name, term in terms.items():
                if "loss" in term:
                    term["grad_norm"] = norms[name]
                    length = norms[first] * norms[name]
                    term["cosine"] = dot(own[first], own[name]) / length if length else 0.0
        if self.project_conflicts:
            gradients.finish(functools.partial(without_conflicts, seed=self.seed))
        else:
            gradients.finish()
        whole = gradients.clip(self.clip)
        if not math.isfinite(whole):
            return f"the gradient's norm is {whole}"
        self.optimizer.step()
        losses = {name: term["loss"] for name, term in terms.items() if "loss" in term}
        self.mixing.update(losses, {name: own[name] for name in losses} if own else {})
        for weighted in self.objectives:
            weighted.tell("end_step", self.model)
        if self.average is not None:
            self.average.update(self.model)
        loss = math.fsum(t["weight"] * t.get("loss", 0.0) for t in terms.values())
        rate = float(self.optimizer.param_groups[0]["lr"])
        record.update(loss=loss, lr=rate, grad_norm=whole, objectives=terms)
        if mixing := self.mixing.metrics():
            record["mixing"] = mixing
        return ""

    def train_step(self) -> Record:
        """One step: every objective's passes, then one update.

        Returns:
            ``step``, ``loss`` (weighted sum), ``lr``, ``grad_norm`` (before clipping), of each of
            the ``objectives`` its raw ``loss``, ``weight``, the ``grad_norm`` of what it added
            where it is known, with ``separate`` the ``cosine`` to the first, and its metrics; what
            ``mixing`` learned; ``fallback``, layers that changed their recipe; and ``seconds``. A
            step not applied has ``skipped``, the reason, and ``culprit`` instead.
        """
        while True:
            record = self.micro_step()
            if record is not None:
                return record

    def _seen(self, measure: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        if self.average is None:
            return measure(self.model)
        return self.average.call(self.model, measure)

    def _evaluate(self) -> None:
        record: Record = {"step": self.step}
        if self.evaluate is not None:
            record["eval"] = self._seen(self.evaluate)
        if self.validate is not None:
            record["validation"] = self._seen(self.validate)
        if len(record) > 1:
            self.record(record)
            chosen = record["eval" if self.validate is None else "validation"]
            if self._best.see(self.step, chosen) and self.validate is not None:
                weights = self.model.state_dict() if self.average is None \
                    else self.average.rounded(self.model)
                weights = sharding.map_tensors(dict(weights), sharding.whole)
                self.save_best(self.step, {"model": weights, "best": dict(self.best)})

    def run(self) -> Outcome:
        """Train to the last step; saves every ``checkpoint_every`` steps and at the end.

        Ctrl-C ends the part of a step that is on (on several ranks the step), saves, and returns;
        a second one raises KeyboardInterrupt at once.
        """
        ranks.check_equal(self.parameters)
        with sigint_noted() as interrupted:
            saved = self.step
            while self.step < self.steps and not self._is_over():
                record = self.micro_step()
                if record is None:
                    if not ranks.is_parallel() and interrupted():
                        self.save(self.step, self.state_dict())
                        return Outcome("interrupted", self.step)
                    continue
                self.record(record)
                last = self.step == self.steps
                if last or self.step % self.eval_every == 0:
                    self._evaluate()
                diverged = self.skipped_in_a_row >= self.max_skipped
                stop = last or diverged or self._is_over() or ranks.any_rank(interrupted())
                if stop or self.step - saved >= self.checkpoint_every:
                    self.save(self.step, self.state_dict())
                    saved = self.step
                if diverged:
                    why = filter(None, (record["skipped"], record.get("culprit")))
                    return Outcome("diverged", self.step, "; ".join(why))
                if stop and not last and not self._is_over():
                    return Outcome("interrupted", self.step)
        if self.step < self.steps:
            reason = f"no better macro-F1 in {self._best.since} evaluations"
            return Outcome("stopped early", self.step, reason)
        return Outcome("finished", self.step)

    def _is_over(self) -> bool:
        return self.patience is not None and self._best.since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next part of a step depends on, as tensors and plain values."""
        passes = self._passes
        streams = {n: s.state_dict() for n, s in self._streams.items()} if passes is None \
            else passes.streams
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best": self._best.state_dict(),
            "clock": int(clock.step),
            "model": sharding.map_tensors(dict(self.model.state_dict()), sharding.whole),
            "optimizer": sharding.map_tensors(self.optimizer.state_dict(), sharding.whole),
            "streams": streams,
            "objectives": {
                term.name: term.objective.state_dict()
                for term in self.objectives if hasattr(term.objective, "state_dict")
            },
            "mixing": self.mixing.state_dict(),
            "random": random_state(),
        }
        for name, part in (("average", self.average), ("fallback", self.fallback)):
            if part is not None:
                state[name] = part.state_dict()
        if passes is not None:
            state["passes"] = passes.state_dict()
            state["gradients"] = self._gradients.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the same bits.

        Raises:
            KeyError, RuntimeError: the state is of another model, optimizer or set of streams.
        """
        sharding.load_model(self.model, state["model"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        for name, stream in self._streams.items():
            stream.load_state_dict(state["streams"][name])
        for term in self.objectives:
            if hasattr(term.objective, "load_state_dict"):
                term.objective.load_state_dict(state["objectives"][term.name])
        self.mixing.load_state_dict(state["mixing"])
        for name, part in (("average", self.average), ("fallback", self.fallback)):
            if part is not None:
                part.load_state_dict(state[name])
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._best.load_state_dict(state["best"])
        clock.set(state["clock"])
        self._passes = None
        if "passes" in state:
            self._passes = self._begin()
            # What the step's beginning forgot is part of the state too.
            for term in self.objectives:
                if hasattr(term.objective, "load_state_dict"):
                    term.objective.load_state_dict(state["objectives"][term.name])
            if self.fallback is not None:
                self.fallback.load_state_dict(state["fallback"])
            self._passes.load_state_dict(state["passes"])
            self._gradients.load_state_dict(state["gradients"])
        set_random_state(state["random"])
