"""Weights as they are given, and what rules that learn them have beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowp.hybrid.gradients import Vector


class Mixing:
    """``L = Σ_k w_k(t) · L_k`` with the weights of the objectives themselves; learns nothing.

    Attributes:
        separate: whether each objective's own gradient is needed.
    """

    separate = False

    def factor(self, name: str) -> float:
        """What is multiplied to an objective's weight."""
        return 1.0

    def update(self, losses: Mapping[str, float], gradients: Mapping[str, Vector]) -> None:
        """Learn from an applied step.

        Args:
            losses: L_k, without weights, of the objectives that were computed.
            gradients: of ``w_k · factor · L_k``, empty unless ``separate``.
        """

    def metrics(self) -> dict[str, float]:
        """What is logged beside the weights."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


def check_names(rule: str, names: Sequence[str], least: int) -> None:
    """ValueError unless there are enough names and none stands twice."""
    if len(names) < least or len(set(names)) != len(names):
        raise ValueError(f"lowp.hybrid.{rule}: expected at least {least} objectives of different "
                         f"names, got {list(names)}")
