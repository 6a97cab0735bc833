"""ClassLM and EvidenceBound: their formulas, and that together they find classes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lowp.hybrid import ClassLM, EvidenceBound, LSTMClassifier, Supervised, TransformerEncoder
from lowp.hybrid.batches import Batch, collate
from tests.objective_formulas import TEXTS, UNEQUAL, agree, log_p, nothing_moves
from tests.text_toys import CLASSES, VOCABULARY, Bag, batch_of

pytestmark = pytest.mark.usefixtures("one_thread")

# As CLOSE of tests/objective_formulas.py, with sums over a text's tokens, which are below 128.
CLOSE_SUM = 60 * 128 * 2**-24


def scores(model: Bag, batch: Batch) -> list[tuple[int, Tensor, int]]:
    """(row, log p(x | c) of every class, ordinary tokens) of the texts that have some."""
    table = log_p(model.class_token_logits())
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        inner = batch.tokens[i, 1:length - 1]
        if length > 2:
            rows.append((i, table[:, inner].sum(1), length - 2))
    return rows


def test_class_lm() -> None:
    def formula(model: Bag) -> Tensor:
        found = scores(model, TEXTS)
        return sum(-row[i % CLASSES] for i, row, _ in found) / sum(n for *_, n in found)

    agree(ClassLM(), TEXTS, formula, close=CLOSE_SUM)
    nothing_moves(ClassLM(), Bag, TEXTS)
    assert ClassLM().count(TEXTS) == 24 and EvidenceBound().count(UNEQUAL) == 22


def test_evidence_bound() -> None:
    def formula(model: Bag) -> Tensor:
        log_q = log_p(model.classify(UNEQUAL.tokens, UNEQUAL.lengths))
        total, tokens = torch.zeros(()), 0
        for i, row, n in scores(model, UNEQUAL):
            q, posterior = log_q[i].exp(), log_p(0.25 * row.detach())
            total = total + n * (q * (log_q[i] - posterior)).sum() - (q.detach() * row).sum()
            tokens += n
        return total / tokens

    agree(EvidenceBound(0.25), UNEQUAL, formula, close=CLOSE_SUM)
    nothing_moves(EvidenceBound(), Bag, UNEQUAL)


def test_the_two_gradients_are_those_of_kingmas_bound() -> None:
    """Of the classifier, as it is; of the tables, when every text has the same length."""
    batch = batch_of([8, 8, 8], labelled=False)
    model, twin = Bag(), Bag()
    EvidenceBound(1.0)(model, batch).loss.backward()
    rows = torch.stack([row for _, row, _ in scores(twin, batch)])
    log_q = log_p(twin.classify(batch.tokens, batch.lengths))
    ((log_q.exp() * (log_q - rows)).sum(-1).mean()).backward()
    torch.testing.assert_close(model.embedding.weight.grad, twin.embedding.weight.grad, rtol=0,
                               atol=CLOSE_SUM)
    torch.testing.assert_close(model.words.grad * 6, twin.words.grad, rtol=0, atol=6 * CLOSE_SUM)


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ClassLM: expected a batch with labels, got None"):
        ClassLM()(Bag(), UNEQUAL)
    for beta in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"EvidenceBound: beta must be in \(0, 1\], got"):
            EvidenceBound(beta)


@pytest.mark.parametrize("make", [TransformerEncoder, LSTMClassifier])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_model_has_tokens_of_classes(make: Any, dtype: torch.dtype) -> None:
    options = {"bidirectional": True} if make is LSTMClassifier else {}
    model = make(VOCABULARY, CLASSES, **options).to(dtype)
    logits = model.class_token_logits()
    assert logits.dtype == torch.float32 and logits.shape == (CLASSES, VOCABULARY)
    EvidenceBound()(model, UNEQUAL).loss.backward()
    for p in (model.lm_bias, model.class_embedding, model.head.weight):
        assert bool(p.grad.any())


def test_texts_without_labels_tell_which_words_belong_together() -> None:
    """Words 5 .. 24 and 25 .. 44 never meet. Labels show two of each; held out are the others."""
    chance = random.Random(0)

    def text(kind: int, first: int, last: int) -> list[int]:
        return [5 + 20 * kind + chance.randrange(first, last) for _ in range(8)]

    labelled = collate([(text(kind, 0, 2), kind) for kind in (0, 1) * 8], range(16))
    unlabelled = collate([(text(kind, 0, 20), None) for kind in (0, 1) * 100], range(200))
    heldout = collate([(text(kind, 2, 20), kind) for kind in (0, 1) * 50], range(100))
    accuracy = []
    for terms in ([Supervised()], [Supervised(), ClassLM(), EvidenceBound()]):
        torch.manual_seed(0)
        model = LSTMClassifier(VOCABULARY, 2, embedding=16, hidden=16, dropout=0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(200):
            optimizer.zero_grad()
            for term in terms:
                if term.stream == "labelled":
                    term(model, labelled).loss.backward()
                elif step >= 20:
                    term(model, unlabelled).loss.backward()
            optimizer.step()
        found = model.classify(heldout.tokens, heldout.lengths).argmax(-1)
        accuracy.append(float((found == heldout.labels).float().mean()))
    assert accuracy[0] < 0.8 and accuracy[1] > 0.95
