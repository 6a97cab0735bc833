"""The best evaluation so far, and how long ago it was."""

from __future__ import annotations

from typing import Any


class Best:
    """Follows one metric, of which more is better; the first of equals stays.

    Args:
        metric: its name.

    Attributes:
        metrics: all of the best evaluation's, and its ``step``; empty before the first.
        since: evaluations after it.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.metrics: dict[str, float] = {}
        self.since = 0

    def see(self, step: int, metrics: dict[str, float]) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        if metrics.get(self.metric, -1.0) > self.metrics.get(self.metric, -1.0):
            self.metrics, self.since = {"step": step, **metrics}, 0
            return True
        self.since += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {"metrics": dict(self.metrics), "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.metrics, self.since = dict(state["metrics"]), state["since"]
