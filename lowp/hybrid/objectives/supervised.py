"""Cross-entropy against labels."""

from __future__ import annotations

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.annealing import SignalAnnealing
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    mean_cross_entropy,
    part_equal,
)
from lowp.hybrid.random import sample_rows


class Supervised(Objective):
    """``L = mean over the batch of CE(classify(x), y)``, in fp32.

    Args:
        label_smoothing: mass spread evenly over all classes, in [0, 1); 0 by default.
        annealing: leave out the texts whose own label is more probable than this allows at a step,
            and take the mean over the others; by default none is left out.

    Metrics: ``accuracy`` on the batch; with annealing ``kept``, the part that is not left out.

    Raises:
        ValueError: label_smoothing out of range; when called, a batch without labels.
    """

    name = "supervised"
    stream = "labelled"

    def __init__(self, label_smoothing: float = 0.0,
                 annealing: SignalAnnealing | None = None) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError("lowp.hybrid.Supervised: label_smoothing must be in [0, 1), "
                             f"got {label_smoothing}")
        self.label_smoothing, self.annealing = label_smoothing, annealing

    def count(self, batch: Batch) -> int | None:
        """The texts; unknown with annealing."""
        return int(batch.tokens.shape[0]) if self.annealing is None else None

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        if batch.labels is None:
            raise ValueError("lowp.hybrid.Supervised: expected a batch with labels, got None")
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        metrics = {"accuracy": part_equal(logits.argmax(-1), batch.labels)}
        labels = batch.labels
        if self.annealing is not None:
            kept = self.annealing.keeps(logits.detach(), labels)
            metrics["kept"] = float(kept.float().mean()) if kept.numel() else 0.0
            logits, labels = logits[kept], labels[kept]
        return ObjectiveResult(mean_cross_entropy(logits, labels, self.label_smoothing), metrics)
