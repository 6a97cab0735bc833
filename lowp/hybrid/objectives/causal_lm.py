"""Next-token modelling."""

from __future__ import annotations

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    mean_cross_entropy,
    part_equal,
)
from lowp.hybrid.padding import valid_mask
from lowp.hybrid.random import sample_rows


class CausalLM(Objective):
    """``L = mean over all positions t with a next token of CE(logits_t, x_{t+1})``, in fp32.

    The auxiliary loss of Rei, "Semi-supervised multitask learning for sequence labeling", ACL 2017,
    section 3. A text of fewer than two tokens has nothing to predict.

    Metrics: ``token_accuracy``; ``tokens``, how many were predicted.

    Raises:
        ValueError: when called, the model is not causal.
    """

    name = "causal_lm"

    def count(self, batch: Batch) -> int | None:
        """The tokens to be predicted."""
        return int((batch.lengths - 1).clamp(min=0).sum())

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        if not model.is_causal:
            raise ValueError("lowp.hybrid.CausalLM: expected a model with is_causal=True, got "
                             f"{type(model).__name__} whose states have seen the next token")
        with sample_rows(batch.sample_ids):
            hidden = model.encode(batch.tokens, batch.lengths)  # [B, T, H]
        lengths = batch.lengths.to(hidden.device)
        has_next = valid_mask(lengths - 1, max(0, batch.tokens.shape[1] - 1))
        logits = model.token_logits(hidden[:, :-1][has_next])  # [N, V]
        targets = batch.tokens[:, 1:][has_next]
        return ObjectiveResult(mean_cross_entropy(logits, targets), {
            "token_accuracy": part_equal(logits.argmax(-1), targets),
            "tokens": float(targets.numel()),
        })
