"""The recurrent text classifier, which is a next-token model too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lowp.hybrid.padding import check_tokens, pooled
from lowp.hybrid.random import Dropout
from lowp.linear import Linear
from lowp.lstm import LSTM
from lowp.recipe import Recipe


class LSTMClassifier(nn.Module):
    """Embedding, packed LSTM, mean and maximum over time, linear head.

    The next token is predicted from the hidden state by a linear map to the embedding's width and
    the embedding itself (Press and Wolf, "Using the output embedding", EACL 2017), which stays in
    the type of the weights. Batches may come in any order; padding is never read; an empty text
    has hidden states 0. The input projection of all time steps is one product by the recipe, and
    what is recurrent is fp32 (:class:`lowp.LSTM`); so a training pass of [64, 64] tokens and 128
    units takes half of ``nn.LSTM``'s time on the CPU.

    Args:
        vocab_size: tokens of the vocabulary.
        num_classes: classes of the head.
        embedding: width of the embedding.
        hidden: units of each direction.
        layers: recurrent layers.
        dropout: probability, on the embeddings (one mask for all time steps) and before the head.
        precision: recipe of the linear layers and the input projections, as :class:`lowp.Linear`
            takes it.
        bidirectional: read both ways; there is no language model then.
        baseline: plain ``nn.Linear`` and ``nn.LSTM`` instead, for comparison.
        seed: of the dropout's bits.

    Attributes:
        is_causal: whether a hidden state depends on earlier tokens alone.
    """

    def __init__(self, vocab_size: int, num_classes: int, embedding: int = 64, hidden: int = 128,
                 layers: int = 1, dropout: float = 0.1,
                 precision: str | int | Recipe = "fp32", bidirectional: bool = False, *,
                 baseline: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.is_causal = not bidirectional
        self.embedding = nn.Embedding(vocab_size, embedding)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        self.embedding_dropout = Dropout(dropout, seed=seed, name="embedding_dropout", shared=True)
        sizes = {"input_size": embedding, "hidden_size": hidden, "num_layers": layers,
                 "batch_first": True, "bidirectional": bidirectional}
        self.lstm: nn.LSTM = nn.LSTM(**sizes) if baseline else LSTM(
            precision=precision, name="lstm", **sizes)
        self.head_dropout = Dropout(dropout, seed=seed, name="head_dropout")

        def linear(inputs: int, outputs: int, name: str) -> nn.Linear:
            if baseline:
                return nn.Linear(inputs, outputs)
            return Linear(inputs, outputs, precision=precision, name=name)

        width = hidden * (1 + bidirectional)
        self.head = linear(2 * width, num_classes, "head")
        if self.is_causal:
            self.lm_transform = linear(width, embedding, "lm_transform")
        self.lm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.class_embedding = nn.Parameter(torch.zeros(num_classes, embedding))

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, T, H] of tokens [B, T], 0 on padding; H twice as wide both ways."""
        check_tokens("lowp.hybrid.LSTMClassifier", tokens, lengths)
        batch, width = tokens.shape
        lengths = lengths.cpu()
        full = lengths.nonzero().flatten()  # an LSTM takes no empty sequences
        features = self.lstm.hidden_size * (1 + self.lstm.bidirectional)
        if full.numel() == 0:
            return self.embedding.weight.new_zeros((batch, width, features))
        embedded = self.embedding_dropout(self.embedding(tokens))
        chosen = full.to(tokens.device)
        if full.numel() < batch:
            embedded = embedded[chosen]
        packed = pack_padded_sequence(embedded, lengths[full], batch_first=True,
                                      enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=width)
        if full.numel() < batch:
            hidden = hidden.new_zeros((batch, width, features)).index_copy(0, chosen, hidden)
        return hidden

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, C]."""
        text = pooled(self.encode(tokens, lengths), lengths)
        return self.head(self.head_dropout(text))  # type: ignore[no-any-return]

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H].

        Raises:
            ValueError: the model reads both ways.
        """
        if not self.is_causal:
            raise ValueError("lowp.hybrid.LSTMClassifier: a bidirectional LSTM has seen the next "
                             "token; expected bidirectional=False for a language model")
        return nn.functional.linear(self.lm_transform(hidden), self.embedding.weight, self.lm_bias)

    def class_token_logits(self) -> Tensor:
        """Logits [C, V], fp32, of the tokens of each class's texts, whatever their order."""
        embedding, bias = self.embedding.weight.float(), self.lm_bias.float()
        return nn.functional.linear(self.class_embedding.float(), embedding, bias)

    def lm_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, T, V] of the token after each position; those on padding mean nothing."""
        return self.token_logits(self.encode(tokens, lengths))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As :meth:`classify`."""
        return self.classify(tokens, lengths)
