"""The model's own confident predictions as labels."""

from __future__ import annotations

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import ObjectiveResult, TextModel
from lowp.hybrid.objectives.thresholds import Labels, SelfLabelled, Threshold
from lowp.hybrid.random import sample_rows


class PseudoLabel(SelfLabelled):
    """``L = mean over the batch of 1[max p ≥ threshold] · CE(classify(x), argmax p)``, in fp32.

    Lee, "Pseudo-label", ICML 2013 workshop, with the threshold of FixMatch, or one that adapts. p
    comes from a pass in evaluation mode without gradients, so labels know no dropout.

    Args:
        threshold: least probability of a label that is used, in [0, 1], 0.95 by default; or
            :class:`FlexMatch`, :class:`FreeMatch`.

    Metrics: those of :class:`lowp.hybrid.objectives.thresholds.Labels`.

    Raises:
        ValueError: threshold out of range.
    """

    name = "pseudo_label"

    def __init__(self, threshold: float | Threshold = 0.95) -> None:
        super().__init__(threshold)

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        labels = Labels(model, batch, self.threshold)
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        return self.with_penalty(labels.cross_entropy(logits, batch.lengths), logits, labels)
