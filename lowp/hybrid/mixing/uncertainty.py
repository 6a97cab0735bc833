"""Weights that an objective's own uncertainty sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowp.hybrid.gradients import Vector
from lowp.hybrid.mixing.mixing import Mixing, check_names

LIMIT = 4.0


class Uncertainty(Mixing):
    """``L = Σ_k e^(-s_k) L_k + ½ s_k``: s_k, the log of a variance, is learned with the weights.

    Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses", CVPR 2018,
    section 3.2, equation 10, for cross-entropies. s follows its gradient ``½ - e^(-s) L`` by plain
    descent, without decay, and stays in [-4, 4]; it settles at ``ln 2L``. Only for losses with
    given targets: one whose targets are the model's own can fall to 0 and would earn the largest
    weight.

    Args:
        names: of the objectives whose weights are learned; the others keep theirs.
        lr: step size of s; 0.025 by default.

    Raises:
        ValueError: no name or one twice, or lr is not positive.
    """

    def __init__(self, names: Sequence[str], lr: float = 0.025) -> None:
        check_names("Uncertainty", names, 1)
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lowp.hybrid.Uncertainty: lr must be positive, got {lr}")
        self.lr = lr
        self.log_variance = dict.fromkeys(names, 0.0)

    def factor(self, name: str) -> float:
        """``e^(-s)``, or 1."""
        return math.exp(-self.log_variance.get(name, 0.0))

    def update(self, losses: Mapping[str, float], gradients: Mapping[str, Vector]) -> None:
        """One step of descent in s."""
        for name, s in self.log_variance.items():
            if name in losses:
                moved = s - self.lr * (0.5 - math.exp(-s) * losses[name])
                self.log_variance[name] = min(LIMIT, max(-LIMIT, moved))

    def metrics(self) -> dict[str, float]:
        """``log_variance/<name>``."""
        return {f"log_variance/{name}": s for name, s in self.log_variance.items()}

    def state_dict(self) -> dict[str, Any]:
        """s of every objective."""
        return {"log_variance": dict(self.log_variance)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.log_variance = dict(state["log_variance"])
