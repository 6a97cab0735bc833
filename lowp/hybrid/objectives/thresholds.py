"""Which of the model's own labels are sure enough to be used."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor, nn

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    nonempty_count,
    part_equal,
    predictions,
)


class Threshold(Protocol):
    """A rule that may learn from step to step."""

    def limits(self, probabilities: Tensor, batch: Batch) -> Tensor: ...
    def penalty(self, logits: Tensor, selected: Tensor) -> Tensor | None: ...
    def begin_step(self) -> None: ...
    def end_step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedThreshold:
    """A label is used if its probability is at least ``value`` (FixMatch, NeurIPS 2020, section
    2.1).

    Also the base of the rules that learn.

    Raises:
        ValueError: value outside [0, 1].
    """

    def __init__(self, value: float = 0.95) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"lowp.hybrid.{type(self).__name__}: threshold must be in [0, 1], "
                             f"got {value}")
        self.value = value

    def limits(self, probabilities: Tensor, batch: Batch) -> Tensor:
        """The least probability of a label that is used, fp32 [B], of probabilities fp32 [B, C]."""
        return probabilities.new_full((probabilities.shape[0],), self.value)

    def penalty(self, logits: Tensor, selected: Tensor) -> Tensor | None:
        """What is added to the loss, of the logits [B, C] that are trained; or nothing."""
        return None

    def begin_step(self) -> None:
        """Forget what a step that was not applied has left."""

    def end_step(self) -> None:
        """Take over what this step has seen."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


class Labels:
    """The model's own labels of a batch.

    Attributes:
        probabilities: fp32 [B, C].
        labels: int64 [B].
        confident: bool [B], of texts that are not empty.
        metrics: ``mask_rate``, the confident part; ``confidence``, the mean of the largest
            probability; ``label_entropy``, the entropy of the histogram of the confident labels
            over the log of the number of classes: 1 for equal parts, 0 when all are one class;
            ``label_accuracy``, how many of the confident are right, where the batch has labels.
    """

    def __init__(self, model: TextModel, batch: Batch, threshold: Threshold) -> None:
        self.probabilities = predictions(model, batch)
        confidence, self.labels = self.probabilities.max(-1)
        nonempty = batch.lengths.to(confidence.device) > 0
        limits = threshold.limits(self.probabilities, batch)
        self.confident = (confidence >= limits) & nonempty
        count = max(1, nonempty_count(batch.lengths))
        self.metrics = {
            "mask_rate": float(self.confident.sum()) / count,
            "confidence": float(confidence[nonempty].sum()) / count,
            "label_entropy": self._entropy(),
        }
        if batch.labels is not None:
            self.metrics["label_accuracy"] = part_equal(self.labels[self.confident],
                                                        batch.labels[self.confident])

    def _entropy(self) -> float:
        classes = self.probabilities.shape[-1]
        histogram = self.labels[self.confident].bincount(minlength=classes).double()
        parts = histogram[histogram > 0] / histogram.sum()
        return abs(float(-(parts * parts.log()).sum()) / math.log(classes))

    def cross_entropy(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """``Σ over the confident of CE(logits, label) / number of texts that are not empty``, fp32.

        Without any confident it is 0 and has a gradient, of zero. All texts divide the sum, so few
        confident predictions weigh little (Sohn et al., "FixMatch", NeurIPS 2020, equation 4).
        """
        logits = logits.float()
        if not bool(self.confident.any()):
            return logits.sum() * 0
        chosen = logits[self.confident]
        loss = nn.functional.cross_entropy(chosen, self.labels[self.confident], reduction="sum")
        return loss / nonempty_count(lengths)


class SelfLabelled(Objective):
    """An objective whose targets are the model's own labels, chosen by a threshold."""

    self_labelled = True

    def __init__(self, threshold: float | Threshold) -> None:
        self.threshold: Threshold = (
            FixedThreshold(threshold) if isinstance(threshold, int | float) else threshold
        )

    def count(self, batch: Batch) -> int | None:
        """The texts that are not empty."""
        return nonempty_count(batch.lengths)

    def with_penalty(self, loss: Tensor, logits: Tensor, labels: Labels) -> ObjectiveResult:
        """The loss, with what the threshold adds to it, and the labels' metrics."""
        metrics = dict(labels.metrics)
        penalty = self.threshold.penalty(logits, labels.confident)
        if penalty is not None:
            metrics["penalty"] = float(penalty.detach())
            loss = loss + penalty
        return ObjectiveResult(loss, metrics)

    def begin_step(self) -> None:
        """As the threshold's."""
        self.threshold.begin_step()

    def end_step(self, model: nn.Module) -> None:
        """As the threshold's."""
        self.threshold.end_step()

    def state_dict(self) -> dict[str, Any]:
        """The threshold's."""
        return self.threshold.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the threshold."""
        self.threshold.load_state_dict(state)
