"""The training loop: several objectives, two streams, one update a step, and an exact resume."""

from __future__ import annotations

import contextlib
import math
import random as python_random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowp.hybrid.random import pass_index
from lowp.key import clock

Record = dict[str, Any]


class BatchStream(Protocol):
    """An endless stream of batches whose whole position is its state."""

    def next(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class WeightedObjective:
    """One term ``w(t) · L`` of the loss.

    Attributes:
        objective: ``(model, batch)`` to a scalar loss, or to a result with ``loss`` and
            ``metrics``. Its ``stream`` attribute, ``"labelled"`` unless it has one, says which
            batches it gets, and its ``name`` how it is logged.
        weight: a number, or a function of the step, 1 at the first. A term of weight 0 is not
            computed.
    """

    objective: Callable[[Any, Any], Any]
    weight: float | Callable[[int], float] = 1.0
    name: str = ""
    stream: str = ""

    def __post_init__(self) -> None:
        kind = getattr(self.objective, "__name__", type(self.objective).__name__)
        self.name = self.name or str(getattr(self.objective, "name", kind))
        self.stream = self.stream or str(getattr(self.objective, "stream", "labelled"))
        if self.stream not in ("labelled", "unlabelled"):
            raise ValueError(f"lowp.hybrid.Trainer: stream of objective {self.name!r} must be "
                             f"'labelled' or 'unlabelled', got {self.stream!r}")

    def weight_at(self, step: int) -> float:
        """``w(step)``, checked to be finite and not negative."""
        weight = float(self.weight(step) if callable(self.weight) else self.weight)
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"lowp.hybrid.Trainer: weight of objective {self.name!r} must be "
                             f"finite and at least 0, got {weight} at step {step}")
        return weight


class Outcome(NamedTuple):
    """Why :meth:`Trainer.run` returned: ``"finished"``, ``"interrupted"`` or ``"diverged"``."""

    status: str
    step: int
    reason: str = ""


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at ``step`` (1 at the first): linear warm-up, then cosine to zero.

    Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5 without restarts. The rate is positive at
    every step of the run, the last included.
    """
    rising = round(warmup * steps)
    if step <= rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising - 1) / max(1, steps - rising)))


class _NotFiniteError(Exception):
    """This step must not be applied; the message says why."""


class _GradientNorm:
    """The norm of what one backward pass adds to the gradients, exactly and without a copy.

    A hook on a leaf sees the gradient of this pass before it is added to those of earlier ones.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._norms: dict[int, Tensor] = {}
        for index, parameter in enumerate(parameters):
            parameter.register_hook(
                lambda grad, index=index: self._see(index, grad)
            )

    def _see(self, index: int, grad: Tensor) -> None:
        self._norms[index] = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)

    def take(self) -> float:
        """The norm since the last call; in the order of the parameters, so it repeats itself."""
        norms = [float(self._norms[index]) for index in sorted(self._norms)]
        self._norms.clear()
        return math.sqrt(math.fsum(norm * norm for norm in norms))


@contextlib.contextmanager
def _sigint_noted() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, so that a step can end; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Trainer:
    """Minimizes ``L = Σ_k w_k(t) · L_k``, one forward and backward for each objective.

    Gradients of the objectives accumulate, so memory is that of the largest and not of the sum.
    The whole gradient is clipped to norm ``clip`` (Pascanu et al., "On the difficulty of training
    recurrent neural networks", ICML 2013, section 3.2), then the optimizer steps once. A step whose
    loss or gradient is not finite is not applied and leaves weights, states and
    :data:`lowp.key.clock` as they were.

    Attributes:
        labelled, unlabelled: the two streams; each gives one batch a step to its objectives.
        steps: training steps of the whole run, which the learning rate's schedule spans.
        warmup: part of the steps in which the learning rate rises.
        max_skipped: consecutive steps that are not applied before the run stops.
        evaluate: the model to metrics on held-out data; ``accuracy`` is what ``best`` follows.
        record: called with each step's and evaluation's record.
        save: called with the state to be checkpointed.

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
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    eval_every: int = 100
    checkpoint_every: int = 100
    record: Callable[[Record], None] = lambda record: None
    save: Callable[[int, dict[str, Any]], None] = lambda step, state: None
    step: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    skipped_in_a_row: int = field(default=0, init=False)
    best: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        names = [term.name for term in self.objectives]
        if not names or len(set(names)) != len(names):
            raise ValueError("lowp.hybrid.Trainer: expected objectives of different names, "
                             f"got {names}")
        if self.unlabelled is None and any(t.stream == "unlabelled" for t in self.objectives):
            raise ValueError("lowp.hybrid.Trainer: an objective needs the unlabelled stream, "
                             "got unlabelled=None")
        if min(self.steps, self.eval_every, self.checkpoint_every, self.max_skipped) < 1:
            raise ValueError("lowp.hybrid.Trainer: steps, eval_every, checkpoint_every and "
                             "max_skipped must be at least 1")
        groups = self.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self.parameters: list[Tensor] = [p for g in groups for p in g["params"] if p.requires_grad]
        self._norm = _GradientNorm(self.parameters)

    def _batches(self) -> dict[str, Any]:
        """This step's batch of each stream that an objective reads; a stream moves once a step."""
        wanted = {term.stream for term in self.objectives}
        streams = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {n: s.next() for n, s in streams.items() if n in wanted and s is not None}

    def _add(self, index: int, term: WeightedObjective, batch: Any, step: int) -> Record:
        """Add the gradients of one term to those that are there."""
        weight = term.weight_at(step)
        if weight == 0:
            return {"weight": 0.0}
        with pass_index(index):
            result = term.objective(self.model, batch)
        loss = result if isinstance(result, Tensor) else result.loss
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"lowp.hybrid.Trainer: objective {term.name!r} must give a scalar "
                             f"loss that depends on the model, got shape {tuple(loss.shape)}, "
                             f"requires_grad={loss.requires_grad}")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _NotFiniteError(f"the loss of {term.name} is {value}")
        with pass_index(index):  # a recomputed forward draws what the first one drew
            (loss * weight).backward()
        metrics = {} if isinstance(result, Tensor) else dict(result.metrics)
        norm = self._norm.take()
        return {"loss": value, "weight": weight, "grad_norm": norm, **metrics}

    def _clip(self) -> float:
        """Scale the gradients to norm ``clip`` if theirs is larger; their norm, summed in fp32."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        norm = math.sqrt(math.fsum(float(n) ** 2 for n in norms))
        if not math.isfinite(norm):
            raise _NotFiniteError(f"the gradient's norm is {norm}")
        if norm > self.clip:
            torch._foreach_mul_(grads, self.clip / norm)
        return norm

    def _update(self, step: int) -> Record:
        self.optimizer.zero_grad(set_to_none=True)
        factor = learning_rate(step, self.steps, self.warmup)
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        batches = self._batches()
        terms = {
            term.name: self._add(index, term, batches[term.stream], step)
            for index, term in enumerate(self.objectives)
        }
        total = math.fsum(t["weight"] * t.get("loss", 0.0) for t in terms.values())
        norm = self._clip()
        self.optimizer.step()
        rate = float(self.optimizer.param_groups[0]["lr"])
        return {"loss": total, "lr": rate, "grad_norm": norm, "objectives": terms}

    def train_step(self) -> Record:
        """One step: every objective's batch, forward and backward, then one update.

        Returns:
            ``step``, ``loss`` (weighted sum), ``lr``, ``grad_norm`` (before clipping), of each of
            the ``objectives`` its raw ``loss``, ``weight``, the ``grad_norm`` of what it added and
            its metrics, and ``seconds``. A step not applied has ``skipped``, the reason, instead.
        """
        self.model.train()
        start = time.perf_counter()
        step = self.step + 1
        try:
            record = {"step": step, **self._update(step)}
            self.skipped_in_a_row = 0
        except _NotFiniteError as reason:
            self.optimizer.zero_grad(set_to_none=True)
            self._norm.take()
            self.skipped += 1
            self.skipped_in_a_row += 1
            record = {"step": step, "skipped": str(reason)}
        self.step = step
        return {**record, "seconds": time.perf_counter() - start}

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        metrics = self.evaluate(self.model)
        self.record({"step": self.step, "eval": metrics})
        if metrics.get("accuracy", -1.0) > self.best.get("accuracy", -1.0):
            self.best = {"step": self.step, **metrics}

    def run(self) -> Outcome:
        """Train to the last step; saves every ``checkpoint_every`` steps and at the end.

        Ctrl-C ends the step, saves, and returns; a second Ctrl-C raises KeyboardInterrupt at once.
        """
        with _sigint_noted() as interrupted:
            saved = self.step
            while self.step < self.steps:
                record = self.train_step()
                self.record(record)
                last = self.step == self.steps
                if last or self.step % self.eval_every == 0:
                    self._evaluate()
                diverged = self.skipped_in_a_row >= self.max_skipped
                stop = last or diverged or interrupted()
                if stop or self.step - saved >= self.checkpoint_every:
                    self.save(self.step, self.state_dict())
                    saved = self.step
                if diverged:
                    return Outcome("diverged", self.step, record["skipped"])
                if stop and not last:
                    return Outcome("interrupted", self.step)
        return Outcome("finished", self.step)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        streams = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best": dict(self.best),
            "clock": int(clock.step),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "streams": {n: s.state_dict() for n, s in streams.items() if s is not None},
            "objectives": {
                term.name: term.objective.state_dict()
                for term in self.objectives if hasattr(term.objective, "state_dict")
            },
            "random": _random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the same bits.

        Raises:
            KeyError, RuntimeError: the state is of another model, optimizer or set of streams.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        streams = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        for name, stream in streams.items():
            if stream is not None:
                stream.load_state_dict(state["streams"][name])
        for term in self.objectives:
            if hasattr(term.objective, "load_state_dict"):
                term.objective.load_state_dict(state["objectives"][term.name])
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_a_row, self.best = state["skipped_in_a_row"], state["best"]
        _set_random_state(state["random"])
        clock.set(state["clock"])


def _random_state() -> dict[str, Any]:
    """The generators of Python, NumPy and torch, for objectives and models that use them."""
    _, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": python_random.getstate(),
        "numpy": [torch.from_numpy(numpy.asarray(keys).copy()), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    python_random.setstate(state["python"])
    keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state(("MT19937", keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
