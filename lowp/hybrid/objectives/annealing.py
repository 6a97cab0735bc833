"""Training-signal annealing: labelled texts that are learned early wait for the unlabelled ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowp.key import clock

KINDS = ("linear", "log", "exp")


class SignalAnnealing:
    """A labelled text counts at a step while ``p(y | x) ≤ η(t)``, t being the part of the steps
    done.

    ``η = α (1 - 1/C) + 1/C`` with α = t (linear), ``1 - exp(-5t)`` (log) or ``exp(5 (t - 1))``
    (exp); Xie et al., "Unsupervised data augmentation", NeurIPS 2020, section 2.3 and figure 4. exp
    frees the signal latest, and has collapsed on small label sets; linear by default.

    Args:
        steps: of the run.
        kind: ``"linear"``, ``"log"`` or ``"exp"``.

    Raises:
        ValueError: an unknown kind, or steps below 1.
    """

    def __init__(self, steps: int, kind: str = "linear") -> None:
        if kind not in KINDS or steps < 1:
            raise ValueError("lowp.hybrid.SignalAnnealing: expected kind of "
                             f"{', '.join(KINDS)} and steps >= 1, got {kind!r} and {steps}")
        self.steps, self.kind = steps, kind

    def limit(self, step: int, classes: int) -> float:
        """η at a step, 1 at the first."""
        t = min(1.0, step / self.steps)
        alpha = {"linear": t, "log": 1 - math.exp(-5 * t), "exp": math.exp(5 * (t - 1))}[self.kind]
        return alpha * (1 - 1 / classes) + 1 / classes

    def keeps(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which texts count, bool [B], of logits [B, C] and labels [B]."""
        p = torch.softmax(logits.float(), dim=-1).gather(1, labels[:, None])[:, 0]
        return p <= self.limit(int(clock.step), logits.shape[-1])
