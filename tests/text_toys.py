"""Texts for the objectives, and the smallest model that can be asked everything, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowp.hybrid.batches import Batch, collate
from lowp.hybrid.padding import valid_mask
from lowp.hybrid.random import Dropout
from lowp.hybrid.tokenizer import CLS, EOS

VOCABULARY, CLASSES = 50, 4


def batch_of(lengths: list[int], labelled: bool = True, first_id: int = 0,
             vocabulary: int = VOCABULARY) -> Batch:
    """Texts ``[start, tokens…, end]`` of these lengths."""
    generator = torch.Generator().manual_seed(3)
    samples: list[tuple[list[int], int | None]] = []
    for number, length in enumerate(lengths):
        inner = torch.randint(5, vocabulary, (max(0, length - 2),), generator=generator).tolist()
        samples.append(([CLS, *inner, EOS][:length], number % CLASSES if labelled else None))
    return collate(samples, range(first_id, first_id + len(lengths)))


class Bag(nn.Module):
    """Hidden state t is tanh of the mean embedding up to t; the text's is the mean of them.

    Args:
        dropout: keyed, on the hidden states.
    """

    is_causal = True

    def __init__(self, dropout: float = 0.0, vocabulary: int = VOCABULARY, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.vocab_size = vocabulary
        self.embedding = nn.Embedding(vocabulary, width, dtype=torch.float64)
        self.embedding.weight = table(vocabulary, width)
        self.classes, self.words, self.ends = table(CLASSES, width), table(vocabulary, width), \
            table(2, width)
        self.dropout = Dropout(dropout)

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        counts = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.dropout(torch.tanh(embedded.cumsum(1) / counts))

    def text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        valid = valid_mask(lengths, tokens.shape[1])[..., None]
        hidden = torch.where(valid, self.encode(tokens, lengths), 0)
        return hidden.sum(1) / lengths.clamp(min=1)[:, None]

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.text(tokens, lengths) @ self.classes.t()

    def token_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.words.t()

    def class_token_logits(self) -> Tensor:
        return self.classes @ self.words.t()

    def span_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.encode(tokens, lengths) @ self.ends.t()


class Writer(Bag):
    """A bag with a decoder: what it wrote so far, plus the text."""

    is_causal = False

    def decode(self, tokens: Tensor, lengths: Tensor, inputs: Tensor, counts: Tensor) -> Tensor:
        return self.encode(inputs, counts) + self.text(tokens, lengths)[:, None]
