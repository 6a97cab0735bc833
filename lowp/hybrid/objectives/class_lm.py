"""The tokens of a text, given its class."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import Objective, ObjectiveResult, TextModel, part_equal
from lowp.hybrid.padding import ordinary_mask


def log_likelihoods(model: TextModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """``log p(x | c) = Σ_t log p(x_t | c)`` over a text's ordinary tokens, fp32 [B, C]; and how
    many these are, int64 [B]."""
    table = torch.log_softmax(model.class_token_logits().float(), dim=-1).t()  # [V, C]
    ordinary = ordinary_mask(batch.tokens, batch.lengths)
    scores = torch.where(ordinary[..., None], table[batch.tokens], 0).sum(1)
    return scores, ordinary.sum(1)


class ClassLM(Objective):
    """``L = mean over the ordinary tokens t of -log p(x_t | y)``, y their text's class, in fp32.

    p(x_t | y) is the unigram model of the text's class: the multinomial naive Bayes of McCallum and
    Nigam, "A comparison of event models for naive Bayes text classification", AAAI workshop 1998,
    with the softmax of ``model.class_token_logits()`` as its table. It learns more from few labels
    than a discriminative loss does (Ng and Jordan, NeurIPS 2001, section 4), and is what
    :class:`EvidenceBound` goes on with on texts without labels.

    Metrics: ``accuracy`` of the class under which the text is the most probable.

    Raises:
        ValueError: when called, a batch without labels.
    """

    name = "class_lm"
    stream = "labelled"

    def count(self, batch: Batch) -> int | None:
        """The ordinary tokens."""
        return int(ordinary_mask(batch.tokens, batch.lengths).sum())

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        if batch.labels is None:
            raise ValueError("lowp.hybrid.ClassLM: expected a batch with labels, got None")
        scores, counts = log_likelihoods(model, batch)
        own = scores.gather(1, batch.labels[:, None])[:, 0]
        loss = -own.sum() / max(1, int(counts.sum()))
        read = counts > 0
        return ObjectiveResult(loss, {
            "accuracy": part_equal(scores.argmax(-1)[read], batch.labels[read])})
