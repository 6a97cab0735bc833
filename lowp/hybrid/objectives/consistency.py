"""The same answer for a text and its strongly augmented form."""

from __future__ import annotations

import torch

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import ObjectiveResult, TextModel
from lowp.hybrid.objectives.thresholds import Labels, SelfLabelled, Threshold
from lowp.hybrid.padding import valid_mask
from lowp.hybrid.random import row_draws, sample_rows, stream_id
from lowp.hybrid.tokenizer import MASK, SPECIAL
from lowp.key import Role, clock


def check_parts(name: str, **parts: float) -> None:
    """ValueError unless each is in [0, 1)."""
    for argument, value in parts.items():
        if not 0 <= value < 1:
            raise ValueError(f"lowp.hybrid.{name}: {argument} must be in [0, 1), got {value}")


def augment(batch: Batch, drop: float, mask: float, seed: int = 0) -> Batch:
    """Each token is left out with probability ``drop``, else hidden with probability ``mask``.

    Special tokens stay. What is left moves together, so lengths shrink. The bits are keyed by
    (seed, step, pass, sample, position); probabilities are multiples of 2^-16.
    """
    tokens, width = batch.tokens, batch.tokens.shape[1]
    lengths = batch.lengths.to(tokens.device)
    valid = valid_mask(lengths, width)
    ordinary = valid & (tokens >= len(SPECIAL))
    step = int(clock.step)

    def happens(use: str, probability: float) -> torch.Tensor:
        bits = row_draws(batch.sample_ids, width, seed, step, stream_id(f"augment/{use}"),
                         Role.AUGMENTATION)
        return ordinary & (bits < round(probability * 65536)).to(tokens.device)

    hidden = torch.where(happens("mask", mask), MASK, tokens)
    keep = valid & ~happens("drop", drop)
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)
    kept = keep.sum(1)
    moved = torch.where(valid_mask(kept, width), hidden.gather(1, order), 0)
    return Batch(moved, kept.to(batch.lengths.device), batch.labels, batch.sample_ids)


class Consistency(SelfLabelled):
    """``L = mean over the batch of 1[max p ≥ threshold] · CE(classify(strong(x)), argmax p)``.

    Sohn et al., "FixMatch", NeurIPS 2020, equation 4, in fp32. The weak form, of which p is, is the
    text itself in evaluation mode without gradients; the strong form lacks some tokens and has
    others hidden (see :func:`augment`), and goes through dropout.

    Args:
        threshold: least probability of a label that is used, in [0, 1], 0.95 by default; or
            :class:`FlexMatch`, :class:`FreeMatch`.
        drop, mask: parts of the tokens left out and hidden, in [0, 1).
        seed: of the augmentation.

    Metrics: as of :class:`PseudoLabel`.

    Raises:
        ValueError: an argument out of range.
    """

    name = "consistency"

    def __init__(self, threshold: float | Threshold = 0.95, drop: float = 0.2, mask: float = 0.2,
                 seed: int = 0) -> None:
        super().__init__(threshold)
        check_parts("Consistency", drop=drop, mask=mask)
        self.drop, self.mask, self.seed = drop, mask, seed

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        labels = Labels(model, batch, self.threshold)
        strong = augment(batch, self.drop, self.mask, self.seed)
        with sample_rows(batch.sample_ids):
            logits = model.classify(strong.tokens, strong.lengths)
        return self.with_penalty(labels.cross_entropy(logits, batch.lengths), logits, labels)
