"""Spans of a text hidden behind sentinels, to be written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lowp.hybrid.batches import Batch, padded
from lowp.hybrid.objectives.decoding import writing_loss, written_count
from lowp.hybrid.objectives.result import Objective, ObjectiveResult
from lowp.hybrid.random import row_draws, sample_rows, stream_id
from lowp.hybrid.tokenizer import CLS, EOS, PAD
from lowp.key import Role, clock


def _segments(total: int, parts: int, draws: Sequence[int]) -> list[int]:
    """Lengths, at least 1 each, of ``parts`` random segments of ``total`` elements."""
    order = sorted(range(total - 1), key=lambda place: (draws[place], place))
    cuts = [0, *sorted(place + 1 for place in order[: parts - 1]), total]
    return [b - a for a, b in itertools.pairwise(cuts)]


def spans_of(tokens: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of a text's tokens are hidden, and in how many spans; 0 and 0 below two tokens."""
    if tokens < 2:
        return 0, 0
    hidden = min(max(round(tokens * rate), 1), tokens - 1)
    return hidden, min(max(round(hidden / mean_span), 1), tokens - hidden)


class SpanCorruption(Objective):
    """``L = mean over the target's tokens of CE(logits_t, y_t)``, in fp32.

    Raffel et al., "Exploring the limits of transfer learning", JMLR 2020, sections 3.1.4 and 3.3.4:
    the part ``rate`` of a text's tokens is hidden, in spans of ``mean_span`` tokens on average that
    begin anywhere but at its start; each becomes one sentinel, and the target is every sentinel
    with the span behind it, then the end token. Which, is keyed by (seed, step, pass, sample). How
    the model writes: ``written_logits``.

    Args:
        sentinels: token numbers, as many as spans in the longest text, used in this order.
        rate: in (0, 1); 0.15 by default.
        mean_span: at least 1; 3 by default.
        seed: of the choice.

    Metrics: ``token_accuracy``; ``mask_rate``, the hidden part of all tokens.

    Raises:
        ValueError: an argument out of range; when called, too few sentinels, or a model that does
            not write.
    """

    name = "span_corruption"

    def __init__(self, sentinels: Sequence[int], rate: float = 0.15, mean_span: float = 3.0,
                 seed: int = 0) -> None:
        if not 0 < rate < 1 or not mean_span >= 1 or not sentinels:
            raise ValueError("lowp.hybrid.SpanCorruption: expected a sentinel, rate in (0, 1) and "
                             f"mean_span >= 1, got {len(sentinels)} sentinels, {rate} and "
                             f"{mean_span}")
        self.sentinels, self.rate, self.mean_span = list(sentinels), rate, mean_span
        self.seed = seed

    @staticmethod
    def sentinels_needed(longest: int, rate: float = 0.15, mean_span: float = 3.0) -> int:
        """How many sentinels a text of ``longest`` tokens takes at the most."""
        return max([1, *(spans_of(n, rate, mean_span)[1] for n in range(longest + 1))])

    def corrupt(self, batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
        """Each text with its spans hidden, and its target."""
        rows = batch.tokens.tolist()
        draws = row_draws(batch.sample_ids, 2 * batch.tokens.shape[1], self.seed, int(clock.step),
                          stream_id("span_corruption"), Role.MASKING).tolist()
        texts, targets = [], []
        for row, length, bits in zip(rows, batch.lengths.tolist(), draws, strict=True):
            text, target = self._hide(row[:length], bits)
            texts.append(text)
            targets.append(target)
        return texts, targets

    def _hide(self, text: list[int], bits: list[int]) -> tuple[list[int], list[int]]:
        inner = [place for place, token in enumerate(text) if token not in (PAD, CLS, EOS)]
        hidden, count = spans_of(len(inner), self.rate, self.mean_span)
        if count == 0:
            return text, []
        if count > len(self.sentinels):
            raise ValueError(f"lowp.hybrid.SpanCorruption: sentinels must be at least {count} for "
                             f"a text of {len(inner)} tokens, got {len(self.sentinels)}")
        shown = _segments(len(inner) - hidden, count, bits[: len(inner)])
        spans = _segments(hidden, count, bits[len(inner) :])
        target, first, sentinel_at = [CLS], 0, {}
        gone: set[int] = set()
        for sentinel, before, size in zip(self.sentinels, shown, spans, strict=False):
            places = inner[first + before : first + before + size]
            sentinel_at[places[0]] = sentinel
            gone.update(places)
            target += [sentinel, *(text[place] for place in places)]
            first += before + size
        kept = [sentinel_at.get(place, token) for place, token in enumerate(text)
                if place not in gone or place in sentinel_at]
        return kept, [*target, EOS]

    def count(self, batch: Batch) -> int | None:
        """The target's tokens that are predicted."""
        return written_count(padded(self.corrupt(batch)[1])[1])

    def __call__(self, model: Any, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        texts, targets = self.corrupt(batch)
        device = batch.tokens.device
        (tokens, lengths), (wanted, target_lengths) = padded(texts), padded(targets)
        with sample_rows(batch.sample_ids):
            result = writing_loss(model, tokens.to(device), lengths, wanted.to(device),
                                  target_lengths)
        hidden = sum(token not in self.sentinels for target in targets for token in target[1:-1])
        shown = sum(token not in (PAD, CLS, EOS, *self.sentinels) for text in texts
                    for token in text)
        result.metrics["mask_rate"] = hidden / max(1, hidden + shown)
        return result
