"""The model's own confident predictions as labels."""

from __future__ import annotations

from torch import Tensor, nn

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    ObjectiveResult,
    TextModel,
    confident_predictions,
    part_equal,
)
from lowp.hybrid.random import sample_rows


def selected_cross_entropy(logits: Tensor, labels: Tensor, selected: Tensor,
                           lengths: Tensor) -> Tensor:
    """``Σ over the selected of CE / number of texts that are not empty``, fp32.

    Without any selected it is 0 and has a gradient, of zero. All texts divide the sum, so few
    confident predictions weigh little (Sohn et al., "FixMatch", NeurIPS 2020, equation 4).
    """
    logits = logits.float()
    if not bool(selected.any()):
        return logits.sum() * 0
    count = int((lengths > 0).sum())
    return nn.functional.cross_entropy(logits[selected], labels[selected], reduction="sum") / count


def label_accuracy(batch: Batch, labels: Tensor, confident: Tensor) -> dict[str, float]:
    """How many of the confident labels are right, if the batch knows."""
    if batch.labels is None:
        return {}
    return {"label_accuracy": part_equal(labels[confident], batch.labels[confident])}


class PseudoLabel:
    """``L = mean over the batch of 1[max p ≥ threshold] · CE(classify(x), argmax p)``, in fp32.

    Lee, "Pseudo-label", ICML 2013 workshop, with the threshold of FixMatch. p comes from a pass in
    evaluation mode without gradients, so labels know no dropout.

    Args:
        threshold: least probability of a label that is used, in [0, 1]; 0.95 by default.

    Metrics: ``mask_rate``, ``confidence``, ``label_entropy`` (see ``confident_predictions``), and
        ``label_accuracy`` where the batch has labels.

    Raises:
        ValueError: threshold out of range.
    """

    name = "pseudo_label"
    stream = "unlabelled"

    def __init__(self, threshold: float = 0.95) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError("lowp.hybrid.PseudoLabel: threshold must be in [0, 1], "
                             f"got {threshold}")
        self.threshold = threshold

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        labels, confident, metrics = confident_predictions(model, batch.tokens, batch.lengths,
                                                           self.threshold)
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        loss = selected_cross_entropy(logits, labels, confident, batch.lengths)
        return ObjectiveResult(loss, {**metrics, **label_accuracy(batch, labels, confident)})
