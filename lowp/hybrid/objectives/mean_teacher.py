"""The answer of a teacher whose weights are the average of the student's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowp.hybrid.average import WeightAverage
from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    mean_over_texts,
    nonempty_count,
    part_equal,
    predictions,
)
from lowp.hybrid.random import sample_rows


class MeanTeacher(Objective):
    """``L = mean over the texts of ‖p_s - p_t‖²``, p_s through dropout, p_t of the teacher, in
    fp32.

    Tarvainen and Valpola, "Mean teachers", NeurIPS 2017, section 2. The teacher's weights are
    :class:`lowp.hybrid.average.WeightAverage` of the student's after every applied step; it answers
    in evaluation mode without gradients. Its usual weight is 10, ramped up.

    Args:
        decay: α in [0, 1); 0.99 by default, 0.999 for runs of many thousand steps.

    Metrics: ``agreement``, texts to which both give the same class; ``confidence`` of the teacher.

    Raises:
        ValueError: decay out of range.
    """

    name = "mean_teacher"
    self_labelled = True

    def __init__(self, decay: float = 0.99) -> None:
        self.teacher = WeightAverage(decay)

    def count(self, batch: Batch) -> int | None:
        """The texts that are not empty."""
        return nonempty_count(batch.lengths)

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        assert isinstance(model, nn.Module)
        teacher = self.teacher.call(model, lambda m: predictions(m, batch))
        with sample_rows(batch.sample_ids):
            logits = model.classify(batch.tokens, batch.lengths)
        student = torch.softmax(logits.float(), dim=-1)
        loss = mean_over_texts((student - teacher).square().sum(-1), batch.lengths)
        full = batch.lengths.to(teacher.device) > 0
        return ObjectiveResult(loss, {
            "agreement": part_equal(student.argmax(-1)[full], teacher.argmax(-1)[full]),
            "confidence": float(mean_over_texts(teacher.amax(-1), batch.lengths)),
        })

    def end_step(self, model: nn.Module) -> None:
        """The teacher follows."""
        self.teacher.update(model)

    def state_dict(self) -> dict[str, Any]:
        """The teacher."""
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that teacher."""
        self.teacher.load_state_dict(state)
