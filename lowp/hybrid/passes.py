"""The forward and backward passes of one step: every objective, part by part."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowp.hybrid import culprit, ranks, sharding
from lowp.hybrid.batches import micro_batches
from lowp.hybrid.generators import random_state, set_random_state
from lowp.hybrid.gradients import Gradients
from lowp.hybrid.mixing import Mixing
from lowp.hybrid.precision import recipe_for
from lowp.hybrid.random import pass_index
from lowp.hybrid.term import WeightedObjective
from lowp.recipe import Recipe

Record = dict[str, Any]


class Passes:
    """The passes of one step.

    Attributes:
        terms: of each objective its weight, and of what was computed so far the loss and metrics,
            means over the whole batch.
        streams: where each stream stood before the step.
        events: what the record says beside.
        kept: layers that no objective's recipe changes.
    """

    def __init__(self, model: nn.Module, objectives: Sequence[WeightedObjective], mixing: Mixing,
                 parts: int, step: int) -> None:
        self.model, self.objectives, self.parts, self.step = model, objectives, parts, step
        self.terms: dict[str, Record] = {
            term.name: {"weight": term.weight_at(step) * mixing.factor(term.name)}
            for term in objectives
        }
        self.is_sharded = sharding.is_sharded(list(model.parameters()))
        self.streams: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.kept: set[str] = set()
        self._done = 0
        self._trouble = ""
        self._batches: dict[str, list[Any]] = {}
        self._shares: list[list[float]] = []

    def start(self, streams: Mapping[str, Any]) -> None:
        """Take this step's batch of each stream that an objective reads; it moves once a step."""
        wanted = {term.stream for term in self.objectives}
        self.streams = {name: stream.state_dict() for name, stream in streams.items()}
        self._random = random_state()
        self._batches = {name: micro_batches(stream.next(), self.parts)
                         for name, stream in streams.items() if name in wanted}
        self._shares = self._find_shares()

    def _find_shares(self) -> list[list[float]]:
        """Of each objective, the part of the whole batch's mean that each part's mean makes up.

        By the objective's counts, over all ranks; one that does not count has equal parts.
        """
        if self.parts == 1 and not ranks.is_parallel():
            return [[1.0] for _ in self.objectives]
        counts = []
        for index, term in enumerate(self.objectives):
            with pass_index(index):
                found = [term.count(part) for part in self._batches[term.stream]]
            counts.append([1.0 if count is None else count for count in found])
        own = torch.tensor(counts, dtype=torch.float64)  # [K, parts]
        wholes = ranks.total_of(own.sum(1)).clamp(min=1)
        return (own / wholes[:, None]).tolist()

    @property
    def is_complete(self) -> bool:
        """Whether the last part was run."""
        return self._done == self.parts

    def _loss(self, index: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """One forward pass: the raw loss and the metrics."""
        term = self.objectives[index]
        assert term.recipe is None or isinstance(term.recipe, Recipe)
        batch = self._batches[term.stream][part]
        with pass_index(index), recipe_for(self.model, term.recipe, self.kept):
            result = term.objective(self.model, batch)
        loss = result if isinstance(result, Tensor) else result.loss
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"lowp.hybrid.Trainer: objective {term.name!r} must give a scalar "
                             f"loss that depends on the model, got shape {tuple(loss.shape)}, "
                             f"requires_grad={loss.requires_grad}")
        return loss, {} if isinstance(result, Tensor) else dict(result.metrics)

    def _forward(self, index: int, part: int) -> Tensor:
        return self._loss(index, part)[0]

    def _backward(self, index: int, loss: Tensor) -> None:
        # A recomputed forward draws what the first one drew, by the same recipe.
        term = self.objectives[index]
        assert term.recipe is None or isinstance(term.recipe, Recipe)
        with pass_index(index), recipe_for(self.model, term.recipe, self.kept):
            loss.backward()

    def run_part(self, gradients: Gradients) -> None:
        """A forward and backward pass of every objective on the next part of its batch.

        A loss that is not finite has no backward; the other passes go on, so that ranks stay
        together, and with sharded weights its own too.
        """
        part = self._done
        for index, term in enumerate(self.objectives):
            record, share = self.terms[term.name], self._shares[index][part]
            if record["weight"] == 0:
                continue
            loss, metrics = self._loss(index, part)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._trouble = self._trouble or f"the loss of {term.name} is {value}"
                if not self.is_sharded:
                    continue
            # Sharded gradients come as the mean over the ranks.
            factor = ranks.world_size() if self.is_sharded else 1
            self._backward(index, loss * (record["weight"] * share * factor))
            for key, number in {"loss": value, **metrics}.items():
                record[key] = record.get(key, 0.0) + share * number
            added = gradients.collect(index)
            if added is not None:
                record["grad_norm"] = added
        self._done += 1

    def finish(self) -> str:
        """After the last part: why the step must not be applied, if some rank says so."""
        if ranks.is_parallel():
            reasons = ranks.all_values(self._trouble) if ranks.any_rank(bool(self._trouble)) else []
            self._trouble = next(filter(None, reasons), "")
        if not self._trouble and ranks.is_parallel():
            for record in self.terms.values():
                keys = [key for key in record if key != "weight"]
                sums = ranks.total_of(torch.tensor([record[k] for k in keys], dtype=torch.float64))
                record.update(zip(keys, sums.tolist(), strict=True))
        return self._trouble

    def culprit(self) -> str:
        """Run the passes once more, exactly as they were, and name what is not finite in them.

        What objectives and generators remember is put back afterwards. With sharded weights, whose
        passes need all ranks, only weights and batches are looked at.
        """
        objectives: list[Any] = [term.objective for term in self.objectives]
        states = [(o, o.state_dict()) for o in objectives if hasattr(o, "state_dict")]
        generators = random_state()
        set_random_state(self._random)
        found = self._search()
        set_random_state(generators)
        for objective, state in states:
            objective.load_state_dict(state)
        if ranks.is_parallel():
            found = next(filter(None, ranks.all_values(found)), "")
        return found

    def _search(self) -> str:
        first = ""
        for part in range(self.parts):
            for index, term in enumerate(self.objectives):
                if self.terms[term.name]["weight"] == 0:
                    continue
                batch = self._batches[term.stream][part]
                run = None if self.is_sharded else functools.partial(self._forward, index, part)
                found = culprit.find(self.model, batch, run)
                if found and not first:
                    first = f"{term.name}, {term.stream} stream: {found}"
                if first and not ranks.is_parallel():
                    return first
        return first

    def state_dict(self) -> dict[str, Any]:
        """What the parts so far have added up, beside the gradients."""
        return {"done": self._done, "terms": {n: dict(t) for n, t in self.terms.items()},
                "trouble": self._trouble, "events": list(self.events),
                "random": self._random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the batches are there already."""
        self._done, self._trouble = state["done"], state["trouble"]
        self.terms = {n: dict(t) for n, t in state["terms"].items()}
        self.events, self._random = list(state["events"]), state["random"]
