"""Two views of a text nearer to each other than to other texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowp.hybrid import ranks
from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    mean_cross_entropy,
    part_equal,
)
from lowp.hybrid.padding import pooled
from lowp.hybrid.random import sample_rows, view


class Contrastive(Objective):
    """``L = mean over texts i of -log (exp(cos(h_i, h'_i)/τ) / Σ_j exp(cos(h_i, h'_j)/τ))``, fp32.

    Gao et al., "SimCSE", EMNLP 2021, equation 4: h and h' are the same texts, each through dropout
    of its own, pooled as the classifier's head pools them. The other texts of the batch, of all
    ranks, are the negatives; with gradient accumulation those of the part. Batches of 64 texts
    and more are usual. Empty texts are left out; fewer than two texts give 0.

    Args:
        temperature: τ > 0; 0.05 by default.

    Metrics: ``accuracy``, how many views are nearest to their own text; ``texts``.

    Raises:
        ValueError: temperature is not positive.
    """

    name = "contrastive"

    def __init__(self, temperature: float = 0.05) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError("lowp.hybrid.Contrastive: temperature must be positive, "
                             f"got {temperature}")
        self.temperature = temperature

    def _embedded(self, model: TextModel, batch: Batch, index: int) -> Tensor:
        """Unit vectors [N, 2H] of the texts of all ranks."""
        with sample_rows(batch.sample_ids), view(index):
            hidden = model.encode(batch.tokens, batch.lengths)
        rows = ranks.gather_rows(pooled(hidden, batch.lengths).float())
        return torch.nn.functional.normalize(rows, dim=-1)

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        first, second = (self._embedded(model, batch, index) for index in (0, 1))
        full = ranks.gathered(batch.lengths.to(first.device)) > 0
        first, second = first[full], second[full]
        similar = first @ second.t() / self.temperature  # [N, N]
        own = torch.arange(first.shape[0], device=first.device)
        metrics = {"accuracy": part_equal(similar.argmax(-1), own),
                   "texts": float(first.shape[0])}
        if first.shape[0] < 2:
            return ObjectiveResult((first.sum() + second.sum()) * 0, metrics)
        return ObjectiveResult(mean_cross_entropy(similar, own), metrics)
