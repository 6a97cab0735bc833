"""Cross-entropy of a text that is to be written from another."""

from __future__ import annotations

from typing import Any

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.decoding import writing_loss, written_count
from lowp.hybrid.objectives.result import Objective, ObjectiveResult
from lowp.hybrid.random import sample_rows


class SequenceToSequence(Objective):
    """``L = mean over all target tokens of CE(logits_t, y_t)``, given x and y before t, in fp32.

    Sutskever et al., "Sequence to sequence learning", NeurIPS 2014, equation 1 in tokens; label
    smoothing as in Vaswani et al., NeurIPS 2017, section 5.4. Reads batches with ``targets`` (see
    :func:`lowp.hybrid.batches.collate_pairs`); the model writes as
    :func:`lowp.hybrid.objectives.decoding.written_logits` says.

    Args:
        label_smoothing: in [0, 1); 0.1 by default.

    Metrics: ``token_accuracy``.

    Raises:
        ValueError: label_smoothing out of range; when called, a batch without targets, or a model
            that neither decodes nor is causal.
    """

    name = "sequence_to_sequence"
    stream = "labelled"

    def __init__(self, label_smoothing: float = 0.1) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError("lowp.hybrid.SequenceToSequence: label_smoothing must be in [0, 1), "
                             f"got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def count(self, batch: Batch) -> int | None:
        """The target tokens that are predicted."""
        return None if batch.target_lengths is None else written_count(batch.target_lengths)

    def __call__(self, model: Any, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        if batch.targets is None or batch.target_lengths is None:
            raise ValueError("lowp.hybrid.SequenceToSequence: expected a batch with targets, "
                             "got None")
        with sample_rows(batch.sample_ids):
            return writing_loss(model, batch.tokens, batch.lengths, batch.targets,
                                batch.target_lengths, self.label_smoothing)
