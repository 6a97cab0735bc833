"""What an objective gives, and what several of them are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


class TextModel(Protocol):
    """What the objectives ask of a model."""

    is_causal: bool
    vocab_size: int
    training: bool

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor: ...
    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor: ...
    def token_logits(self, hidden: Tensor) -> Tensor: ...
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


def part_equal(predicted: Tensor, targets: Tensor) -> float:
    """Part of the entries that are equal; of nothing, 0."""
    return float((predicted == targets).float().mean()) if targets.numel() else 0.0


@torch.no_grad()
def confident_predictions(model: TextModel, tokens: Tensor, lengths: Tensor,
                          threshold: float) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The model's own labels, from a pass in evaluation mode without gradients.

    Returns:
        Labels, int64 [B]; which are confident, bool [B], of texts that are not empty; and metrics:
        ``mask_rate``, the confident part; ``confidence``, the mean of the largest probability; and
        ``label_entropy``, the entropy of the histogram of the confident labels over the log of the
        number of classes: near 0 while the mask rate is high, all texts go to one class.
    """
    was_training = model.training
    model.train(False)
    try:
        probabilities = torch.softmax(model.classify(tokens, lengths).float(), dim=-1)
    finally:
        model.train(was_training)
    confidence, labels = probabilities.max(-1)
    nonempty = lengths.to(labels.device) > 0
    confident = (confidence >= threshold) & nonempty
    classes = probabilities.shape[-1]
    histogram = labels[confident].bincount(minlength=classes).double()
    parts = histogram[histogram > 0] / histogram.sum()
    entropy = float(-(parts * parts.log()).sum()) / float(torch.log(torch.tensor(float(classes))))
    count = max(1, int(nonempty.sum()))
    return labels, confident, {
        "mask_rate": float(confident.sum()) / count,
        "confidence": float(confidence[nonempty].sum()) / count,
        "label_entropy": abs(entropy),
    }
