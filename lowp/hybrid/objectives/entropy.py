"""Sure answers for unlabelled texts."""

from __future__ import annotations

import torch

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    mean_over_texts,
    nonempty_count,
)
from lowp.hybrid.random import sample_rows


class EntropyMinimization(Objective):
    """``L = mean over the texts of H(p) = -Σ_c p_c log p_c``, p = softmax(classify(x)), in fp32.

    Grandvalet and Bengio, "Semi-supervised learning by entropy minimization", NeurIPS 2004,
    section 2.2. Its usual weight is 0.06.

    Metrics: ``confidence``, the mean of the largest probability.
    """

    name = "entropy"
    self_labelled = True

    def count(self, batch: Batch) -> int | None:
        """The texts that are not empty."""
        return nonempty_count(batch.lengths)

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        log_p = torch.log_softmax(logits.float(), dim=-1)
        p = log_p.exp()
        confidence = mean_over_texts(p.detach().amax(-1), batch.lengths)
        loss = mean_over_texts(-(p * log_p).sum(-1), batch.lengths)
        return ObjectiveResult(loss, {"confidence": float(confidence)})
