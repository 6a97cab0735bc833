"""What an objective gives, and what several of them are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowp.hybrid.batches import Batch


class TextModel(Protocol):
    """What the objectives ask of a model."""

    is_causal: bool
    vocab_size: int
    training: bool

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor: ...
    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor: ...
    def token_logits(self, hidden: Tensor) -> Tensor: ...
    def class_token_logits(self) -> Tensor: ...
    def train(self, mode: bool = True) -> object: ...


@dataclass
class ObjectiveResult:
    """A loss to be differentiated, and numbers to be logged.

    Attributes:
        loss: fp32 scalar, averaged over what it counts.
        metrics: by name.
    """

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Objective:
    """What the objectives of this package have beside their formula; all of it may be left out.

    Attributes:
        name: how it is logged.
        stream: ``"labelled"`` or ``"unlabelled"``, which batches it reads.
        self_labelled: its targets come from the model itself, so it may fall to 0 by itself and its
            weight must not be learned.
    """

    name = ""
    stream = "unlabelled"
    self_labelled = False

    def count(self, batch: Batch) -> int | None:
        """Over how many things the loss is a mean, known before any pass.

        The parts of a batch, on several ranks or one after another, then weigh by their counts, and
        the loss is the mean over the whole. ``None``: parts weigh alike.
        """
        return None

    def begin_step(self) -> None:
        """A step begins; what an earlier one, which was not applied, has left is dropped."""

    def end_step(self, model: nn.Module) -> None:
        """The step was applied; the model has its new weights."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


def mean_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of ``-log softmax(logits)[target]`` in fp32; over nothing, 0 with a zero gradient.

    Args:
        logits: [N, C] of any float type.
        targets: int64 [N].
        label_smoothing: mass spread evenly over all classes (Szegedy et al., CVPR 2016, section 7).
    """
    logits = logits.float()
    if targets.numel() == 0:
        return logits.sum() * 0
    return nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def mean_over_texts(terms: Tensor, lengths: Tensor) -> Tensor:
    """``Σ terms / number of texts that are not empty``, of fp32 terms [B]; an empty text's is
    dropped.

    Of no text it is 0, with a zero gradient.
    """
    nonempty = lengths.to(terms.device) > 0
    return torch.where(nonempty, terms, 0).sum() / max(1, nonempty_count(lengths))


def nonempty_count(lengths: Tensor) -> int:
    """How many texts have a token."""
    return int((lengths > 0).sum())


def part_equal(predicted: Tensor, targets: Tensor) -> float:
    """Part of the entries that are equal; of nothing, 0."""
    return float((predicted == targets).float().mean()) if targets.numel() else 0.0


@torch.no_grad()
def predictions(model: TextModel, batch: Batch) -> Tensor:
    """``softmax(classify(x))``, fp32 [B, C], in evaluation mode without gradients."""
    was_training = model.training
    model.train(False)
    try:
        return torch.softmax(model.classify(batch.tokens, batch.lengths).float(), dim=-1)
    finally:
        model.train(was_training)
