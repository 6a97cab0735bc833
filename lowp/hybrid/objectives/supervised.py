"""Cross-entropy against labels."""

from __future__ import annotations

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    ObjectiveResult,
    TextModel,
    mean_cross_entropy,
    part_equal,
)
from lowp.hybrid.random import sample_rows


class Supervised:
    """``L = mean over the batch of CE(classify(x), y)``, in fp32.

    Args:
        label_smoothing: mass spread evenly over all classes, in [0, 1); 0 by default.

    Metrics: ``accuracy`` on the batch.

    Raises:
        ValueError: label_smoothing out of range; when called, a batch without labels.
    """

    name = "supervised"
    stream = "labelled"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError("lowp.hybrid.Supervised: label_smoothing must be in [0, 1), "
                             f"got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        if batch.labels is None:
            raise ValueError("lowp.hybrid.Supervised: expected a batch with labels, got None")
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        loss = mean_cross_entropy(logits, batch.labels, self.label_smoothing)
        return ObjectiveResult(loss, {"accuracy": part_equal(logits.argmax(-1), batch.labels)})
