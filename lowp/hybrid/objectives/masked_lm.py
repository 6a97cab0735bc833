"""Masked-token modelling."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    TextModel,
    mean_cross_entropy,
    part_equal,
)
from lowp.hybrid.padding import ordinary_mask
from lowp.hybrid.random import integers, row_draws, sample_rows, stream_id
from lowp.hybrid.tokenizer import MASK, SPECIAL
from lowp.key import Role, clock


class MaskedLM(Objective):
    """``L = mean over the chosen positions of CE(logits_t, x_t)``, in fp32, x being hidden there.

    Devlin et al., "BERT", NAACL 2019, section 3.1: each token is chosen with probability ``rate``;
    of the chosen, 80 % become the mask token, 10 % a random one, 10 % stay. Special tokens are
    neither chosen nor drawn. The choice is keyed by (seed, step, pass, sample, position).

    With ``continues`` whole words are chosen: a token that continues a word shares the draw of the
    word's first token (Cui et al., "Pre-training with whole word masking for Chinese BERT", 2019,
    section 2.2), and each token's fate stays its own.

    Args:
        rate: in (0, 1), taken to a multiple of 2^-16; 0.15 by default.
        continues: bool [V], which tokens continue a word (:meth:`lowp.hybrid.Tokenizer.continues`);
            by default tokens are chosen one by one.
        seed: of the choice.

    Metrics: ``mask_rate``, the chosen part of all tokens that may be; ``token_accuracy`` on them.

    Raises:
        ValueError: rate out of range; when called, a causal model, which sees one side only.
    """

    name = "masked_lm"

    def __init__(self, rate: float = 0.15, seed: int = 0, continues: Tensor | None = None) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"lowp.hybrid.MaskedLM: rate must be in (0, 1), got {rate}")
        self.rate, self.seed, self.continues = rate, seed, continues

    def count(self, batch: Batch) -> int | None:
        """The chosen positions."""
        return int(self._chosen(batch).sum())

    def _bits(self, use: str, batch: Batch) -> Tensor:
        return row_draws(batch.sample_ids, batch.tokens.shape[1], self.seed, int(clock.step),
                         stream_id(f"masked_lm/{use}"), Role.MASKING).to(batch.tokens.device)

    def _chosen(self, batch: Batch) -> Tensor:
        """Which positions are hidden, bool [B, T]."""
        tokens = batch.tokens
        drawn = self._bits("choice", batch) < round(self.rate * 65536)
        if self.continues is not None and tokens.shape[1]:
            place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            inside = self.continues.to(tokens.device)[tokens]
            first = torch.where(inside, 0, place).cummax(dim=1).values
            drawn = drawn.gather(1, first)
        return drawn & ordinary_mask(tokens, batch.lengths)

    def corrupt(self, batch: Batch, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The tokens with some hidden, int64 [B, T], and which were chosen, bool [B, T]."""
        tokens, chosen, fate = batch.tokens, self._chosen(batch), self._bits("fate", batch)
        other = len(SPECIAL) + integers(
            batch.sample_ids, tokens.shape[1], vocab_size - len(SPECIAL), self.seed,
            int(clock.step), stream_id("masked_lm/token"), Role.MASKING)
        hidden = torch.where(fate < round(0.9 * 65536), other.to(tokens.device), tokens)
        hidden = torch.where(fate < round(0.8 * 65536), MASK, hidden)
        return torch.where(chosen, hidden, tokens), chosen

    def __call__(self, model: TextModel, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        if model.is_causal:
            raise ValueError("lowp.hybrid.MaskedLM: expected a model with is_causal=False, got "
                             f"{type(model).__name__}, which sees one side of a hidden token only")
        corrupted, chosen = self.corrupt(batch, model.vocab_size)
        with sample_rows(batch.sample_ids):
            hidden = model.encode(corrupted, batch.lengths)  # [B, T, H]
        logits = model.token_logits(hidden[chosen])  # [N, V]
        targets = batch.tokens[chosen]
        candidates = int(ordinary_mask(batch.tokens, batch.lengths).sum())
        return ObjectiveResult(mean_cross_entropy(logits, targets), {
            "mask_rate": targets.numel() / max(1, candidates),
            "token_accuracy": part_equal(logits.argmax(-1), targets),
        })
