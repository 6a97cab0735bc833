"""A threshold for each class, lower where the model has learned less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.hybrid import ranks
from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.thresholds import FixedThreshold


class FlexMatch(FixedThreshold):
    """``τ(c) = β_c / (2 - β_c) · τ``, ``β_c = σ_c / max(max σ, samples - Σσ)``.

    Zhang et al., "FlexMatch", NeurIPS 2021, equations 5, 11 and 12: σ_c counts the unlabelled
    samples whose latest label above τ was c; those never above τ count in the denominator, which
    is the warm-up. A step uses the counts of the steps before it.

    Args:
        classes: how many there are.
        samples: how many unlabelled samples there are, the numbers of a batch's ``sample_ids``.
        value: τ; 0.95 by default.

    Raises:
        ValueError: value outside [0, 1], or fewer than one class or sample.
    """

    def __init__(self, classes: int, samples: int, value: float = 0.95) -> None:
        super().__init__(value)
        if classes < 1 or samples < 1:
            raise ValueError("lowp.hybrid.FlexMatch: classes and samples must be at least 1, "
                             f"got {classes} and {samples}")
        self.classes = classes
        self.latest = torch.full((samples,), -1, dtype=torch.int64)
        self._seen: list[Tensor] = []

    def class_limits(self) -> Tensor:
        """τ(c), fp32 [C]."""
        counts = torch.bincount(self.latest + 1, minlength=self.classes + 1).double()
        unused, sigma = counts[0], counts[1:]
        beta = sigma / torch.maximum(sigma.max(), unused)
        return (beta / (2 - beta) * self.value).float()

    def limits(self, probabilities: Tensor, batch: Batch) -> Tensor:
        """τ of each text's label, fp32 [B]."""
        confidence, labels = probabilities.max(-1)
        sure = ((confidence >= self.value).cpu() & (batch.lengths > 0))
        own = torch.stack([batch.sample_ids[sure], labels.cpu()[sure]], dim=1)  # [n, 2]
        self._seen.append(ranks.gathered(own.to(probabilities.device)).cpu())
        return self.class_limits().to(labels.device)[labels]

    def begin_step(self) -> None:
        """Forget what a step that was not applied has left."""
        self._seen = []

    def end_step(self) -> None:
        """The labels above τ of this step are the latest of their samples."""
        for ids, labels in (seen.t() for seen in self._seen):
            self.latest[ids] = labels
        self._seen = []

    def state_dict(self) -> dict[str, Any]:
        """Each sample's latest label, and what the step has seen so far."""
        return {"latest": self.latest.clone(), "seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is of another number of samples.
        """
        if state["latest"].shape != self.latest.shape:
            raise ValueError(f"lowp.hybrid.FlexMatch.load_state_dict: state must be of "
                             f"{self.latest.numel()} samples, got {state['latest'].numel()}")
        self.latest, self._seen = state["latest"].clone(), list(state["seen"])
