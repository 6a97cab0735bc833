"""Byte-level BPE learned from the training texts, and batches of padded rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

PAD, START, END = 0, 1, 2
IGNORED = -100  # a label that cross-entropy leaves out


def learn(texts: Iterable[str], vocab_size: int) -> ByteLevelBPETokenizer:
    """A tokenizer that gives every text back exactly (Sennrich et al., ACL 2016, on bytes)."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2,
                                  special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    return tokenizer


def encode(tokenizer: ByteLevelBPETokenizer, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Tokens of each text, cut to ``longest`` with the end token."""
    return [[*e.ids[: longest - 1], END] for e in tokenizer.encode_batch(list(texts))]


def padded(rows: Sequence[Sequence[int]], fill: int = PAD) -> Tensor:
    """int64 [B, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
