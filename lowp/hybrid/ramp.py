"""Weights of objectives that change with the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("constant", "linear", "cosine", "sigmoid")


@dataclass(frozen=True)
class Ramp:
    """A weight from ``start`` to ``end`` over ``steps`` steps, and ``end`` after them.

    With t = min(1, step / steps): ``start + (end - start) · f(t)``, f = 1 (constant), t (linear),
    (1 - cos πt) / 2 (cosine) or exp(-5 (1 - t)²) (sigmoid; Laine and Aila, "Temporal ensembling",
    ICLR 2017, appendix A). Sigmoid by default.

    Raises:
        ValueError: an unknown kind, a weight that is negative or not finite, or steps below 1.
    """

    kind: str = "sigmoid"
    start: float = 0.0
    end: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"lowp.hybrid.Ramp: kind must be one of {', '.join(KINDS)}, "
                             f"got {self.kind!r}")
        for name, value in (("start", self.start), ("end", self.end)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"lowp.hybrid.Ramp: {name} must be finite and at least 0, "
                                 f"got {value}")
        if self.steps < 1:
            raise ValueError(f"lowp.hybrid.Ramp: steps must be at least 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        """The weight at a step, 1 at the first."""
        t = min(1.0, max(0.0, step / self.steps))
        rise = {"constant": 1.0, "linear": t, "cosine": (1 - math.cos(math.pi * t)) / 2,
                "sigmoid": math.exp(-5 * (1 - t) ** 2)}[self.kind]
        return self.start + (self.end - self.start) * rise
