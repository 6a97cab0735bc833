"""A text written again from a damaged form of it."""

from __future__ import annotations

from typing import Any

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.consistency import augment, check_parts
from lowp.hybrid.objectives.decoding import writing_loss, written_count
from lowp.hybrid.objectives.result import Objective, ObjectiveResult
from lowp.hybrid.random import sample_rows


class Denoising(Objective):
    """``L = mean over all tokens of -log p(x_t | noise(x), x before t)``, in fp32.

    A denoising autoencoder (Vincent et al., ICML 2008, section 2.3) that writes; with one network
    for both parts and no noise, the sequence autoencoder of Dai and Le, "Semi-supervised
    sequence learning", NeurIPS 2015, section 2. Noise leaves out and hides tokens (Hill et al.,
    NAACL 2016, section 3.1, and ``augment``). How the model writes: ``written_logits``.

    Args:
        drop, mask: parts of the tokens left out and hidden, in [0, 1); 0.1 and 0 by default.
        seed: of the noise.

    Metrics: ``token_accuracy``.

    Raises:
        ValueError: an argument out of range; when called, a model that does not write.
    """

    name = "denoising"

    def __init__(self, drop: float = 0.1, mask: float = 0.0, seed: int = 0) -> None:
        check_parts("Denoising", drop=drop, mask=mask)
        self.drop, self.mask, self.seed = drop, mask, seed

    def count(self, batch: Batch) -> int | None:
        """The tokens that are predicted."""
        return written_count(batch.lengths)

    def __call__(self, model: Any, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        noisy = augment(batch, self.drop, self.mask, self.seed)
        with sample_rows(batch.sample_ids):
            return writing_loss(model, noisy.tokens, noisy.lengths, batch.tokens, batch.lengths)
