"""A threshold that follows the model's own confidence, overall and of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.hybrid import ranks
from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.thresholds import FixedThreshold


def _normalized(x: Tensor) -> Tensor:
    return x / x.sum()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / b.clamp(min=1e-30), 0)


class FreeMatch(FixedThreshold):
    """``τ_t(c) = p̃_t(c) / max p̃_t · τ_t``, with a penalty for unfair labels.

    Wang et al., "FreeMatch", ICLR 2023. With q the predictions of a batch and λ the momentum:
    ``τ_t = λ τ_{t-1} + (1-λ) mean max q`` (equation 5), ``p̃_t = λ p̃_{t-1} + (1-λ) mean q`` (6), the
    threshold above (7), and ``h̃_t = λ h̃_{t-1} + (1-λ) hist(argmax q)`` (11). All begin at 1 / C.
    The penalty is ``fairness · Σ_c a_c log b_c`` with ``a = p̃/h̃`` and ``b = p̄/h̄``, each divided
    by its sum (10, 12): p̄ is the mean of the trained predictions of the confident texts and h̄ the
    histogram of their labels. Means are over the texts of all ranks, the penalty's over one's own.

    Args:
        classes: C.
        momentum: λ in [0, 1); 0.999 by default, 0.99 for a run of less than 1000 steps.
        fairness: the penalty's factor; 0.01 by default.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, classes: int, momentum: float = 0.999, fairness: float = 0.01) -> None:
        super().__init__(1.0)
        if classes < 2 or not 0 <= momentum < 1 or not 0 <= fairness < float("inf"):
            raise ValueError("lowp.hybrid.FreeMatch: expected classes >= 2, momentum in [0, 1) and "
                             f"fairness >= 0, got {classes}, {momentum} and {fairness}")
        self.classes, self.momentum, self.fairness = classes, momentum, fairness
        # [1 + 2C] fp64: τ, p̃, h̃
        self.averages = torch.full((1 + 2 * classes,), 1 / classes, dtype=torch.float64)
        self._sums = torch.zeros(2 + 2 * classes, dtype=torch.float64)  # the same, and of what
        self._current = self.averages

    def _moved(self, sums: Tensor) -> Tensor:
        """The averages after a batch whose sums, and count at the end, are these."""
        if not bool(sums[-1] > 0):
            return self.averages
        return self.momentum * self.averages + (1 - self.momentum) * sums[:-1] / sums[-1]

    def limits(self, probabilities: Tensor, batch: Batch) -> Tensor:
        """τ_t of each text's label, fp32 [B]."""
        q = probabilities[batch.lengths.to(probabilities.device) > 0].double()
        confidence, labels = q.max(-1)
        histogram = labels.bincount(minlength=self.classes).double()
        count = q.new_tensor([q.shape[0]])
        own = torch.cat([confidence.sum()[None], q.sum(0), histogram, count])
        sums = ranks.total(own).cpu()
        self._sums = self._sums + sums
        self._current = self._moved(sums)
        mean, p = self._current[0], self._current[1 : 1 + self.classes]
        limits = (p / p.max() * mean).float().to(probabilities.device)
        return limits[probabilities.argmax(-1)]

    def penalty(self, logits: Tensor, selected: Tensor) -> Tensor | None:
        """``fairness · Σ a log b``; nothing where no text is confident."""
        if self.fairness == 0 or not bool(selected.any()):
            return None
        p, h = self._current[1:].float().to(logits.device).chunk(2)
        trained = torch.softmax(logits[selected].float(), dim=-1)
        histogram = trained.argmax(-1).bincount(minlength=self.classes).float()
        a = _normalized(_ratio(p, h))
        b = _normalized(_ratio(trained.mean(0), _normalized(histogram)))
        return self.fairness * (a * torch.log(b + 1e-12)).sum()

    def begin_step(self) -> None:
        """Forget what a step that was not applied has left."""
        self._sums = torch.zeros_like(self._sums)

    def end_step(self) -> None:
        """The averages move by all that this step has seen."""
        self.averages = self._moved(self._sums)
        self.begin_step()

    def state_dict(self) -> dict[str, Any]:
        """The averages, and what the step has seen so far."""
        return {"averages": self.averages, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.averages, self._sums = state["averages"], state["sums"]
