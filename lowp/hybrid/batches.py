"""Batches of an endless stream: its order is a function of the seed, its state one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowp.hybrid.random import MAX_ROWS, permutation

Sample = tuple[Sequence[int], int | None]


@dataclass
class Batch:
    """Texts as tokens.

    Attributes:
        tokens: int64 [B, T], padded on the right with 0.
        lengths: int64 [B], in 0 .. T.
        labels: int64 [B], or ``None`` for a batch without labels.
        sample_ids: int64 [B], each text's number in its data set: what its random bits belong to.
        targets: int64 [B, S], the texts to be written, padded as the tokens are, or ``None``.
        target_lengths: int64 [B], or ``None``.
        spans: int64 [B, 2], first and last token of each answer, or ``None``.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor | None
    sample_ids: Tensor
    targets: Tensor | None = None
    target_lengths: Tensor | None = None
    spans: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device; lengths and sample ids stay on the CPU, that reads them."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return Batch(self.tokens.to(device), self.lengths, moved(self.labels), self.sample_ids,
                     moved(self.targets), self.target_lengths, moved(self.spans))


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, T], padded on the right with 0 to the longest, and lengths int64 [B]."""
    lengths = torch.tensor([len(tokens) for tokens in texts], dtype=torch.int64)
    width = int(lengths.max()) if texts else 0
    rows = [[*tokens, *[0] * (width - len(tokens))] for tokens in texts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), width), lengths


def collate(samples: Sequence[Sample], sample_ids: Sequence[int]) -> Batch:
    """The batch of some samples: their tokens padded to the longest.

    Raises:
        ValueError: some samples have labels and some have none.
    """
    tokens, lengths = padded([tokens for tokens, _ in samples])
    labels = [label for _, label in samples]
    known = [label for label in labels if label is not None]
    if known and len(known) != len(labels):
        raise ValueError("lowp.hybrid.collate: samples must all have a label or all have none, "
                         f"got {len(known)} of {len(labels)} with one")
    return Batch(tokens, lengths, torch.tensor(known, dtype=torch.int64) if known else None,
                 torch.tensor(sample_ids, dtype=torch.int64))


def collate_pairs(samples: Sequence[tuple[Sequence[int], Sequence[int]]],
                  sample_ids: Sequence[int]) -> Batch:
    """The batch of some pairs of a text and the text to be written from it."""
    tokens, lengths = padded([source for source, _ in samples])
    targets, target_lengths = padded([target for _, target in samples])
    return Batch(tokens, lengths, None, torch.tensor(sample_ids, dtype=torch.int64), targets,
                 target_lengths)


def collate_spans(samples: Sequence[tuple[Sequence[int], tuple[int, int]]],
                  sample_ids: Sequence[int]) -> Batch:
    """The batch of some texts with the place of the answer in each: first and last token."""
    tokens, lengths = padded([text for text, _ in samples])
    spans = torch.tensor([span for _, span in samples], dtype=torch.int64).reshape(-1, 2)
    return Batch(tokens, lengths, None, torch.tensor(sample_ids, dtype=torch.int64), spans=spans)


def micro_batches(batch: Any, count: int) -> list[Any]:
    """A batch in ``count`` parts of its rows, in their order and as even as can be.

    Args:
        batch: a tensor whose first dimension is the rows, or a tuple, list, mapping or dataclass of
            such tensors; a number, string or ``None`` in it belongs to every part.

    Raises:
        ValueError: fewer rows than parts. TypeError: a batch of another kind.
    """
    if count == 1:
        return [batch]
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or batch.shape[0] < count:
            raise ValueError(f"lowp.hybrid.micro_batches: batch must have at least {count} rows, "
                             f"got shape {tuple(batch.shape)}")
        return list(batch.tensor_split(count))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        return [type(batch)(*part) for part in _parts(values, count)]
    if isinstance(batch, dict):
        parts = _parts(list(batch.values()), count)
        return [dict(zip(batch, part, strict=True)) for part in parts]
    if isinstance(batch, tuple | list) and not all(isinstance(v, _WHOLE) for v in batch):
        parts = _parts(list(batch), count)
        return [type(batch)(*part) if hasattr(batch, "_fields") else type(batch)(part)
                for part in parts]
    raise TypeError("lowp.hybrid.micro_batches: batch must be a tensor or a tuple, list, mapping "
                    f"or dataclass of tensors to be parted, got {type(batch).__name__}")


_WHOLE = (int, float, str, type(None))  # what every part of a batch gets as it is


def _parts(values: list[Any], count: int) -> list[list[Any]]:
    split = [[v] * count if isinstance(v, _WHOLE) else micro_batches(v, count) for v in values]
    return [list(part) for part in zip(*split, strict=True)]


class Stream:
    """Endless batches, epoch after epoch, each in its own order; a batch may span two epochs.

    The order is a function of (seed, epoch, dataset id), so the whole state is one number, the
    cursor: how many samples all ranks together have read. A global batch is the next
    ``batch_size`` samples; rank r of R reads the r-th R-th of it.

    Args:
        samples: tokens and label (or ``None``) of each text.
        batch_size: of all ranks together.
        seed: of the run.
        dataset_id: what tells the order from that of other streams of the run.
        rank, world_size: which part of each batch to read.
        collate: samples and their numbers to a batch: :func:`collate`, :func:`collate_pairs`, …

    Raises:
        ValueError: no samples, or a batch size that the ranks cannot share evenly.
    """

    def __init__(self, samples: Sequence[Any], batch_size: int, seed: int = 0,
                 dataset_id: int = 0, rank: int = 0, world_size: int = 1,
                 collate: Callable[[Sequence[Any], Sequence[int]], Batch] = collate) -> None:
        if not 0 < len(samples) <= MAX_ROWS:
            raise ValueError(f"lowp.hybrid.Stream: samples must be 1 to {MAX_ROWS}, "
                             f"got {len(samples)}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError("lowp.hybrid.Stream: rank must be in 0 .. world_size - 1, "
                             f"got rank {rank} of {world_size}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError("lowp.hybrid.Stream: batch_size must be a positive multiple of "
                             f"world_size {world_size}, got {batch_size}")
        self.samples, self.batch_size = samples, batch_size
        self.seed, self.dataset_id = seed, dataset_id
        self.rank, self.world_size, self.collate = rank, world_size, collate
        self.cursor = 0
        self._orders: dict[int, list[int]] = {}

    @property
    def epoch(self) -> int:
        """How often all samples have been read."""
        return self.cursor // len(self.samples)

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.samples))
        if epoch not in self._orders:
            order = permutation(len(self.samples), self.seed, epoch, self.dataset_id).tolist()
            self._orders = {k: v for k, v in self._orders.items() if k >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch][place]

    def next(self) -> Batch:
        """This rank's part of the next global batch."""
        share = self.batch_size // self.world_size
        first = self.cursor + self.rank * share
        ids = [self._sample_at(position) for position in range(first, first + share)]
        self.cursor += self.batch_size
        return self.collate([self.samples[i] for i in ids], ids)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it counts in."""
        return {"cursor": self.cursor, "samples": len(self.samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on however many ranks.

        Raises:
            ValueError: the state is of a stream of another number of samples.
        """
        if state["samples"] != len(self.samples):
            raise ValueError("lowp.hybrid.Stream.load_state_dict: state must be of "
                             f"{len(self.samples)} samples, got {state['samples']}")
        self.cursor = int(state["cursor"])
