"""A small transformer encoder, which is a masked-token model too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowp.hybrid.padding import check_tokens, pooled, valid_mask
from lowp.hybrid.random import Dropout
from lowp.linear import Linear
from lowp.recipe import Recipe

Position = tuple[Tensor, Tensor]  # row and time step of each valid token, int64 [N] each


class _GELULinear(nn.Linear):
    """The comparison twin of a linear layer with a fused activation."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(super().forward(input))


class _Block(nn.Module):
    """Attention and MLP, each on the normalized sum so far and added to it (pre-norm)."""

    def __init__(self, name: str, width: int, heads: int, dropout: float,
                 precision: str | int | Recipe, baseline: bool, seed: int) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int, part: str, activation: str = "none") -> nn.Linear:
            if baseline:
                kind = nn.Linear if activation == "none" else _GELULinear
                return kind(inputs, outputs)
            return Linear(inputs, outputs, precision=precision, activation=activation,
                          name=f"{name}.{part}")

        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = linear(width, 3 * width, "qkv")
        self.out = linear(width, width, "out")
        self.mlp_norm = nn.LayerNorm(width)
        self.up = linear(width, 4 * width, "up", "gelu")
        self.down = linear(4 * width, width, "down")
        self.attention_dropout = Dropout(dropout, seed=seed, name=f"{name}.attention_dropout")
        self.mlp_dropout = Dropout(dropout, seed=seed, name=f"{name}.mlp_dropout")

    def _attend(self, x: Tensor, position: Position, valid: Tensor) -> Tensor:
        batch, width = valid.shape
        qkv = x.new_zeros((batch, width, x.shape[-1])).index_put(position, x)
        q, k, v = qkv.view(batch, width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=valid[:, None, None])  # [B, heads, T, D]
        rows: Tensor = attended.transpose(1, 2).reshape(batch, width, -1)[position]  # [N, W]
        return rows

    def forward(self, x: Tensor, position: Position, valid: Tensor) -> Tensor:
        """x [N, W]; valid, bool [B, T], is where its rows stand and what may be attended to."""
        attended = self._attend(self.qkv(self.attention_norm(x)), position, valid)
        x = x + self.attention_dropout(self.out(attended), position)
        hidden = self.down(self.up(self.mlp_norm(x)))
        total: Tensor = x + self.mlp_dropout(hidden, position)
        return total


class TransformerEncoder(nn.Module):
    """Pre-norm encoder (Xiong et al., ICML 2020, section 3) with learned positions.

    Everything but attention is computed on the valid tokens alone, [N, W], so padding costs
    nothing there and cannot enter a layer's quantization scales. The masked token is predicted by a
    linear map, gelu, a norm and the embedding itself (Devlin et al., "BERT", NAACL 2019), which
    stays in the type of the weights. An empty text has hidden states 0.

    Args:
        vocab_size: tokens of the vocabulary.
        num_classes: classes of the head.
        width: of the hidden states, a multiple of ``heads``.
        depth: blocks.
        heads: attention heads.
        max_length: longest text, in tokens.
        dropout: probability, after the embedding, each attention and MLP, and before the head.
        precision: recipe of the linear layers, as :class:`lowp.Linear` takes it.
        baseline: plain ``nn.Linear`` instead, for comparison.
        seed: of the dropout's bits.

    Raises:
        ValueError: heads do not divide the width.
    """

    is_causal = False

    def __init__(self, vocab_size: int, num_classes: int, width: int = 128, depth: int = 2,
                 heads: int = 4, max_length: int = 128, dropout: float = 0.1,
                 precision: str | int | Recipe = "fp32", *, baseline: bool = False,
                 seed: int = 0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"lowp.hybrid.TransformerEncoder: heads must divide width {width}, "
                             f"got {heads}")
        self.vocab_size, self.num_classes, self.max_length = vocab_size, num_classes, max_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.embedding_dropout = Dropout(dropout, seed=seed, name="embedding_dropout")
        self.blocks = nn.ModuleList(
            _Block(f"blocks.{i}", width, heads, dropout, precision, baseline, seed)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head_dropout = Dropout(dropout, seed=seed, name="head_dropout")
        if baseline:
            self.head = nn.Linear(2 * width, num_classes)
            self.lm_transform: nn.Linear = _GELULinear(width, width)
        else:
            self.head = Linear(2 * width, num_classes, precision=precision, name="head")
            self.lm_transform = Linear(width, width, precision=precision, activation="gelu",
                                       name="lm_transform")
        self.lm_norm = nn.LayerNorm(width)
        self.lm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.class_embedding = nn.Parameter(torch.zeros(num_classes, width))

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, T, W] of tokens [B, T], 0 on padding.

        Raises:
            ValueError: a text is longer than max_length.
        """
        check_tokens("lowp.hybrid.TransformerEncoder", tokens, lengths)
        batch, width = tokens.shape
        lengths = lengths.to(tokens.device)
        longest = int(lengths.max()) if batch else 0
        if longest > self.max_length:
            raise ValueError("lowp.hybrid.TransformerEncoder: lengths must be at most max_length "
                             f"{self.max_length}, got {longest}")
        valid = valid_mask(lengths, width)
        row, time = valid.nonzero(as_tuple=True)
        position = (row, time)
        if row.numel() == 0:
            return self.norm.weight.new_zeros((batch, width, self.embedding.embedding_dim))
        x = self.embedding(tokens[position]) + self.positions(time)  # [N, W]
        x = self.embedding_dropout(x, position)
        attended = valid.clone()
        attended[:, 0] = True  # an empty text attends to a zero, for a softmax over nothing is NaN
        for block in self.blocks:
            x = block(x, position, attended)
        x = self.norm(x)
        padded: Tensor = x.new_zeros((batch, width, x.shape[-1]))
        return padded.index_put(position, x)

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, C]."""
        text = pooled(self.encode(tokens, lengths), lengths)
        return self.head(self.head_dropout(text))  # type: ignore[no-any-return]

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., W]."""
        transformed = self.lm_norm(self.lm_transform(hidden))
        return nn.functional.linear(transformed, self.embedding.weight, self.lm_bias)

    def class_token_logits(self) -> Tensor:
        """Logits [C, V], fp32, of the tokens of each class's texts, whatever their order."""
        embedding, bias = self.embedding.weight.float(), self.lm_bias.float()
        return nn.functional.linear(self.class_embedding.float(), embedding, bias)

    def lm_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, T, V] of the token at each position; those on padding mean nothing."""
        return self.token_logits(self.encode(tokens, lengths))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As :meth:`classify`."""
        return self.classify(tokens, lengths)
