"""The tokens of a text, whichever its class may be."""

from __future__ import annotations

import torch

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.class_lm import log_likelihoods
from lowp.hybrid.objectives.result import Objective, ObjectiveResult, TextModel, part_equal
from lowp.hybrid.padding import ordinary_mask
from lowp.hybrid.random import sample_rows


class EvidenceBound(Objective):
    """``L = Σ_x (n KL(q ‖ p(c | x)) - Σ_c q_c log p(x | c)) / Σ_x n``, in fp32.

    n are the ordinary tokens of a text x, so L is a mean over tokens. The evidence lower bound of
    Kingma et al., "Semi-supervised learning with deep generative models", NeurIPS 2014, equation 7,
    with q = softmax(classify(x)) as the posterior, a uniform prior of the classes, and the unigram
    models of :class:`ClassLM` for p(x | c). Its two gradients are computed apart: q's is that of
    the divergence to p(c | x) = softmax(β log p(x | c)), and p(x | c)'s, for a fixed q, that of a
    language model's loss per token; in the bound itself β is 1 and the first is n times weaker.
    Wants :class:`ClassLM` beside it, and a ramp: a bound knows classes, but not which is which.

    Args:
        beta: β in (0, 1], of Ueda and Nakano, "Deterministic annealing EM algorithm", Neural
            Networks 11, 1998. Words of a text are not independent, so 1 is too sure, and one class
            may end with all texts: on SST-2 with 100 labels one seed of five ended at chance with
            1, none with 0.3, the default.

    Metrics: ``confidence``, the mean of the largest q; ``agreement``, the part of the texts whose
    class is the same under q and under p(c | x).

    Raises:
        ValueError: beta out of range.
    """

    name = "evidence_bound"
    self_labelled = True

    def __init__(self, beta: float = 0.3) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"lowp.hybrid.EvidenceBound: beta must be in (0, 1], got {beta}")
        self.beta = beta

    def count(self, batch: Batch) -> int | None:
        """The ordinary tokens."""
        return int(ordinary_mask(batch.tokens, batch.lengths).sum())

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        log_q = torch.log_softmax(logits.float(), dim=-1)
        q = log_q.exp()
        scores, counts = log_likelihoods(model, batch)
        log_posterior = torch.log_softmax(self.beta * scores.detach(), dim=-1)
        inference = (q * (log_q - log_posterior)).sum(-1)
        generation = -(q.detach() * scores).sum(-1)
        read = counts > 0
        texts = max(1, int(read.sum()))
        loss = (counts * inference + generation).sum() / max(1, int(counts.sum()))
        confidence = torch.where(read, q.detach().amax(-1), 0).sum() / texts
        return ObjectiveResult(loss, {
            "confidence": float(confidence),
            "agreement": part_equal(q.argmax(-1)[read], scores.argmax(-1)[read])})
