"""One term of the loss: an objective, its weight and its precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowp.recipe import Recipe, recipe_of


@dataclass
class WeightedObjective:
    """One term ``w(t) · L`` of the loss.

    Attributes:
        objective: ``(model, batch)`` to a scalar loss, or to a result with ``loss`` and
            ``metrics``. Its ``stream`` attribute, ``"labelled"`` unless it has one, says which
            batches it gets, and its ``name`` how it is logged. What else it may have:
            :class:`lowp.hybrid.objectives.Objective`.
        weight: a number, or a function of the step, 1 at the first. A term of weight 0 is not
            computed.
        recipe: what the model's lowp layers run this term's passes by, as :class:`lowp.Linear`
            takes it; ``None`` for their own.
    """

    objective: Callable[[Any, Any], Any]
    weight: float | Callable[[int], float] = 1.0
    name: str = ""
    stream: str = ""
    recipe: str | int | Recipe | None = None

    def __post_init__(self) -> None:
        kind = getattr(self.objective, "__name__", type(self.objective).__name__)
        self.name = self.name or str(getattr(self.objective, "name", kind))
        self.stream = self.stream or str(getattr(self.objective, "stream", "labelled"))
        if self.stream not in ("labelled", "unlabelled"):
            raise ValueError(f"lowp.hybrid.Trainer: stream of objective {self.name!r} must be "
                             f"'labelled' or 'unlabelled', got {self.stream!r}")
        if self.recipe is not None:
            self.recipe = recipe_of(self.recipe)

    def weight_at(self, step: int) -> float:
        """``w(step)``, checked to be finite and not negative."""
        weight = float(self.weight(step) if callable(self.weight) else self.weight)
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"lowp.hybrid.Trainer: weight of objective {self.name!r} must be "
                             f"finite and at least 0, got {weight} at step {step}")
        return weight

    def count(self, batch: Any) -> float | None:
        """Over how many things the loss of a batch is a mean, if the objective tells."""
        found = getattr(self.objective, "count", lambda batch: None)(batch)
        return None if found is None else float(found)

    def tell(self, what: str, *arguments: Any) -> None:
        """Call ``begin_step`` or ``end_step`` of the objective, if it has one."""
        getattr(self.objective, what, lambda *arguments: None)(*arguments)
