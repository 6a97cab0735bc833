"""Texts written from texts: what the objectives with a decoder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.hybrid.objectives.result import ObjectiveResult, mean_cross_entropy, part_equal
from lowp.hybrid.padding import valid_mask


def _joined(tokens: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Each text followed by its target at once, [B, T + S], padded with 0."""
    joined = tokens.new_zeros((tokens.shape[0], tokens.shape[1] + targets.shape[1]))
    valid = valid_mask(lengths, tokens.shape[1])
    joined[:, : tokens.shape[1]] = torch.where(valid, tokens, 0)
    place = lengths[:, None] + torch.arange(targets.shape[1], device=tokens.device)
    written = valid_mask(target_lengths, targets.shape[1])
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(place)
    joined[rows[written], place[written]] = targets[written]
    return joined


def written_logits(model: Any, tokens: Tensor, lengths: Tensor, targets: Tensor,
                   target_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of every target token but each target's first, and those tokens: [N, V] and int64 [N].

    Each is predicted from the text and the target tokens before it. A model with a method
    ``decode(tokens, lengths, inputs, input_lengths)`` to hidden states [B, S, H] of the inputs
    writes with that; a causal one reads the text and goes on with the target, encoder and decoder
    being one (Dai and Le, "Semi-supervised sequence learning", NeurIPS 2015, section 2).

    Args:
        tokens, lengths: int64 [B, T] and [B].
        targets, target_lengths: int64 [B, S] and [B], with the start token and the end token.

    Raises:
        ValueError: the model can do neither.
    """
    device = tokens.device
    lengths, target_lengths = lengths.to(device), target_lengths.to(device)
    width = max(0, targets.shape[1] - 1)
    inputs, follow = targets[:, :width], valid_mask(target_lengths - 1, width)
    count = (target_lengths - 1).clamp(min=0)
    if hasattr(model, "decode"):
        hidden = model.decode(tokens, lengths.cpu(), inputs, count.cpu())
        states = hidden[follow]
    elif getattr(model, "is_causal", False):
        joined = _joined(tokens, lengths, inputs, count)
        hidden = model.encode(joined, (lengths + count).cpu())
        place = lengths[:, None] + torch.arange(width, device=device)
        rows = torch.arange(tokens.shape[0], device=device)[:, None].expand_as(place)
        states = hidden[rows[follow], place[follow]]
    else:
        raise ValueError("lowp.hybrid: an objective that writes text needs a model with a decode "
                         f"method or is_causal=True, got {type(model).__name__}")
    return model.token_logits(states), targets[:, 1:][follow]


def writing_loss(model: Any, tokens: Tensor, lengths: Tensor, targets: Tensor,
                 target_lengths: Tensor, label_smoothing: float = 0.0) -> ObjectiveResult:
    """Mean cross-entropy over the target tokens, with ``token_accuracy``; see above."""
    logits, expected = written_logits(model, tokens, lengths, targets, target_lengths)
    loss = mean_cross_entropy(logits, expected, label_smoothing)
    return ObjectiveResult(loss, {"token_accuracy": part_equal(logits.argmax(-1), expected)})


def written_count(target_lengths: Tensor) -> int:
    """How many target tokens are predicted."""
    return int((target_lengths - 1).clamp(min=0).sum())
