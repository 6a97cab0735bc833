"""Accuracy and macro-F1 on texts that no objective has seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowp.hybrid.batches import Batch, collate


def metrics_of(confusion: Tensor) -> dict[str, float]:
    """Accuracy and macro-F1 of a confusion matrix [true class, predicted class] of counts.

    The F1 of a class that neither occurs nor is predicted counts as 0, as in most libraries.
    """
    counts = confusion.double()
    right = counts.diagonal()
    sizes = counts.sum(0) + counts.sum(1)
    f1 = torch.where(sizes > 0, 2 * right / sizes.clamp(min=1), 0)
    return {
        "accuracy": float(right.sum() / counts.sum().clamp(min=1)),
        "macro_f1": float(f1.mean()),
    }


class HeldOut:
    """Classifies held-out texts; the result does not depend on their order.

    Args:
        texts: each text's tokens.
        labels: each text's class.
        classes: how many classes there are.
        batch_size: texts at a time.

    Raises:
        ValueError: no texts, or not one label for each.
    """

    def __init__(self, texts: Sequence[Sequence[int]], labels: Sequence[int], classes: int,
                 batch_size: int = 256) -> None:
        if not texts or len(texts) != len(labels):
            raise ValueError("lowp.hybrid.HeldOut: expected a label for each of at least one text, "
                             f"got {len(texts)} texts and {len(labels)} labels")
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        self.classes = classes
        self.batches: list[Batch] = []
        for start in range(0, len(texts), batch_size):
            chosen = by_length[start:start + batch_size]
            self.batches.append(collate([(texts[i], labels[i]) for i in chosen], chosen))

    def chance(self) -> float:
        """Accuracy of always naming the most frequent class."""
        labels = torch.cat([batch.labels for batch in self.batches if batch.labels is not None])
        return float(labels.bincount().max() / labels.numel())

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """``accuracy``, ``macro_f1`` and mean cross-entropy ``loss``, in evaluation mode."""
        was_training = model.training
        model.eval()
        try:
            confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64)
            loss = torch.zeros((), dtype=torch.float64)
            for batch in self.batches:
                labels = batch.labels
                assert labels is not None
                logits = model.classify(batch.tokens, batch.lengths).float()  # type: ignore[operator]
                loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
                index = labels * self.classes + logits.argmax(-1)
                confusion += index.bincount(minlength=self.classes**2).view_as(confusion)
        finally:
            model.train(was_training)
        return {**metrics_of(confusion), "loss": float(loss / confusion.sum())}
