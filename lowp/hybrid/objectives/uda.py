"""The same, sharpened answer for a text and its augmented form."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.consistency import augment, check_parts
from lowp.hybrid.objectives.result import ObjectiveResult, TextModel, mean_over_texts
from lowp.hybrid.objectives.thresholds import Labels, SelfLabelled
from lowp.hybrid.random import sample_rows


def divergence(p: Tensor, logits: Tensor) -> Tensor:
    """``KL(p ‖ softmax(logits))`` of each row, fp32 [B], of p [B, C] and logits [B, C]."""
    log_q = torch.log_softmax(logits.float(), dim=-1)
    terms: Tensor = torch.special.xlogy(p, p) - p * log_q
    return terms.sum(-1)


class UDA(SelfLabelled):
    """``L = mean over the batch of 1[max p > threshold] · KL(sharp(p) ‖ q)``, in fp32.

    Xie et al., "Unsupervised data augmentation", NeurIPS 2020, section 2.2 (equation 1) and 2.3: p
    is the prediction for the text in evaluation mode without gradients, ``sharp(p) = p^(1/T) / Σ
    p^(1/T)``, and q the prediction for its augmented form (see ``augment``) through dropout.
    Beside it, :class:`Supervised` may get :class:`SignalAnnealing`.

    Args:
        temperature: T in (0, 1]; 0.4 by default.
        threshold: β in [0, 1]; 0.8 by default.
        drop, mask: parts of the tokens left out and hidden, in [0, 1).
        seed: of the augmentation.

    Metrics: as of :class:`PseudoLabel`.

    Raises:
        ValueError: an argument out of range.
    """

    name = "uda"

    def __init__(self, temperature: float = 0.4, threshold: float = 0.8, drop: float = 0.2,
                 mask: float = 0.2, seed: int = 0) -> None:
        super().__init__(threshold)
        check_parts("UDA", drop=drop, mask=mask)
        if not 0 < temperature <= 1:
            raise ValueError(f"lowp.hybrid.UDA: temperature must be in (0, 1], got {temperature}")
        self.temperature, self.drop, self.mask, self.seed = temperature, drop, mask, seed

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        labels = Labels(model, batch, self.threshold)
        sharp = torch.softmax(labels.probabilities.log() / self.temperature, dim=-1)
        strong = augment(batch, self.drop, self.mask, self.seed)
        with sample_rows(batch.sample_ids):
            logits = model.classify(strong.tokens, strong.lengths)
        terms = torch.where(labels.confident, divergence(sharp, logits), 0)
        return ObjectiveResult(mean_over_texts(terms, batch.lengths), labels.metrics)
