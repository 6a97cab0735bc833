"""The first and last token of an answer that stands in the text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import Objective, ObjectiveResult, mean_cross_entropy
from lowp.hybrid.padding import valid_mask
from lowp.hybrid.random import sample_rows


class SpanModel(Protocol):
    """A model that points at tokens."""

    def span_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor: ...


class SpanExtraction(Objective):
    """``L = mean over the texts of ½ (CE(start, s) + CE(end, e))``, in fp32, over valid tokens.

    Devlin et al., "BERT", NAACL 2019, section 4.2; a text without an answer has both at token 0
    (section 4.3). Reads batches with ``spans`` and a model with ``span_logits(tokens, lengths)`` to
    [B, T, 2], the logits of start and end; those on padding are left out.

    Metrics: ``exact``, texts of which both ends are right.

    Raises:
        ValueError: when called, a batch without spans, or with one outside its text.
    """

    name = "span_extraction"
    stream = "labelled"

    def count(self, batch: Batch) -> int | None:
        """The texts."""
        return int(batch.tokens.shape[0])

    def __call__(self, model: SpanModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        spans = batch.spans
        if spans is None:
            raise ValueError("lowp.hybrid.SpanExtraction: expected a batch with spans, got None")
        lengths = batch.lengths.to(spans.device)
        if not bool(((spans >= 0) & (spans < lengths[:, None])).all()):
            raise ValueError("lowp.hybrid.SpanExtraction: spans must lie inside their texts, got "
                             f"{spans.tolist()} in texts of {lengths.tolist()} tokens")
        with sample_rows(batch.sample_ids):
            logits = model.span_logits(batch.tokens, batch.lengths).float()  # [B, T, 2]
        valid = valid_mask(lengths, batch.tokens.shape[1])
        logits = logits.masked_fill(~valid[..., None], -torch.inf)
        start, end = logits.unbind(-1)
        loss = 0.5 * (mean_cross_entropy(start, spans[:, 0]) + mean_cross_entropy(end, spans[:, 1]))
        right = (start.argmax(-1) == spans[:, 0]) & (end.argmax(-1) == spans[:, 1]) \
            if spans.numel() else spans.new_zeros(0, dtype=torch.bool)
        return ObjectiveResult(loss, {"exact": float(right.float().mean()) if len(right) else 0.0})
