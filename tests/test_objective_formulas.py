"""Every objective against its formula, written out again in fp64, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowp.hybrid import (
    UDA,
    Batch,
    CausalLM,
    Consistency,
    Contrastive,
    Denoising,
    EntropyMinimization,
    FreeMatch,
    MaskedLM,
    MeanTeacher,
    PseudoLabel,
    SequenceToSequence,
    SignalAnnealing,
    SpanCorruption,
    SpanExtraction,
    Supervised,
    VirtualAdversarial,
)
from lowp.hybrid.batches import collate_pairs, collate_spans
from lowp.hybrid.objectives.consistency import augment
from lowp.hybrid.random import sample_rows, view
from lowp.key import clock
from tests.objective_formulas import TEXTS, UNEQUAL, agree, log_p, nothing_moves
from tests.text_toys import CLASSES, VOCABULARY, Bag, Writer, batch_of

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_supervised(smoothing: float) -> None:
    def formula(model: Bag) -> Tensor:
        rows = log_p(model.classify(TEXTS.tokens, TEXTS.lengths))
        return torch.stack([
            -(1 - smoothing) * rows[i, i % CLASSES] - smoothing * rows[i].mean() for i in range(4)
        ]).mean()

    agree(Supervised(smoothing), TEXTS, formula)
    nothing_moves(Supervised(smoothing), Bag, TEXTS)


def test_annealing_leaves_out_what_is_known() -> None:
    batch = batch_of([5] * 24)
    clock.set(3)
    annealing = SignalAnnealing(steps=30, kind="linear")
    limit = 3 / 30 * (1 - 1 / CLASSES) + 1 / CLASSES
    p = log_p(Bag().classify(batch.tokens, batch.lengths)).exp().detach()
    kept = [i for i in range(24) if float(p[i, i % CLASSES]) <= limit]
    assert 0 < len(kept) < 24

    def formula(model: Bag) -> Tensor:
        rows = log_p(model.classify(batch.tokens, batch.lengths))
        return torch.stack([-rows[i, i % CLASSES] for i in kept]).mean()

    objective = Supervised(annealing=annealing)
    agree(objective, batch, formula)
    assert objective(Bag(), batch).metrics["kept"] == pytest.approx(len(kept) / 24)
    t = 0.1
    for kind, alpha in (("log", 1 - math.exp(-5 * t)), ("exp", math.exp(5 * (t - 1)))):
        found = SignalAnnealing(30, kind).limit(3, 4)
        assert found == pytest.approx(alpha * 0.75 + 0.25)
    assert SignalAnnealing(30, "exp").limit(30, 4) == SignalAnnealing(30).limit(99, 4) == 1.0


def test_causal_lm() -> None:
    def formula(model: Bag) -> Tensor:
        rows = log_p(model.token_logits(model.encode(UNEQUAL.tokens, UNEQUAL.lengths)))
        return -torch.stack([
            rows[i, t, UNEQUAL.tokens[i, t + 1]]
            for i, n in enumerate(UNEQUAL.lengths.tolist()) for t in range(n - 1)
        ]).mean()

    agree(CausalLM(), UNEQUAL, formula)
    nothing_moves(CausalLM(), Bag, UNEQUAL)


def test_masked_lm_of_whole_words() -> None:
    continues = torch.arange(VOCABULARY) % 3 == 0
    continues[:5] = False
    objective = MaskedLM(0.4, continues=continues)
    batch = batch_of([30, 22, 0, 2], labelled=False)
    corrupted, chosen = objective.corrupt(batch, VOCABULARY)
    for row, n in enumerate(batch.lengths.tolist()):
        for t in range(1, n - 1):
            if continues[batch.tokens[row, t]] and int(batch.tokens[row, t - 1]) >= 5:
                assert chosen[row, t] == chosen[row, t - 1], "a word is hidden whole or not at all"
    assert objective.count(batch) == int(chosen.sum()) > 5

    def formula(model: Writer) -> Tensor:
        rows = log_p(model.token_logits(model.encode(corrupted, batch.lengths)))
        return -torch.stack([rows[i, t, batch.tokens[i, t]]
                             for i, t in chosen.nonzero().tolist()]).mean()

    agree(objective, batch, formula, Writer)
    nothing_moves(objective, Writer, batch)


def written(model: Any, text: list[int], target: list[int]) -> list[Tensor]:
    """-log p of every target token but the first, one text alone."""
    terms = []
    for t in range(1, len(target)):
        before = torch.tensor([target[:t]])
        if model.is_causal:
            read = torch.tensor([text + target[:t]])
            hidden = model.encode(read, torch.tensor([read.shape[1]]))[0, -1]
        else:
            tokens, length = torch.tensor([text]), torch.tensor([len(text)])
            hidden = model.decode(tokens, length, before, torch.tensor([t]))[0, -1]
        terms.append(-log_p(model.token_logits(hidden))[target[t]])
    return terms


@pytest.mark.parametrize("make", [Bag, Writer])
def test_sequence_to_sequence(make: Callable[[], Any]) -> None:
    pairs = [([3, 9, 8, 4], [3, 7, 4]), ([3, 4], [3, 11, 12, 13, 4]), ([3, 6, 4], [3])]
    batch = collate_pairs(pairs, [4, 0, 9])
    objective = SequenceToSequence(label_smoothing=0.0)

    def formula(model: Any) -> Tensor:
        return torch.stack([t for pair in pairs for t in written(model, *pair)]).mean()

    agree(objective, batch, formula, make)
    nothing_moves(objective, make, batch)
    assert objective.count(batch) == 2 + 4
    with pytest.raises(ValueError, match="expected a batch with targets, got None"):
        objective(make(), TEXTS)


@pytest.mark.parametrize("make", [Bag, Writer])
def test_denoising(make: Callable[[], Any]) -> None:
    objective = Denoising(drop=0.3, mask=0.2)
    noisy = augment(TEXTS, 0.3, 0.2)

    def formula(model: Any) -> Tensor:
        return torch.stack([
            t for i, n in enumerate(TEXTS.lengths.tolist())
            for t in written(model, noisy.tokens[i, : noisy.lengths[i]].tolist(),
                             TEXTS.tokens[i, :n].tolist())
        ]).mean()

    agree(objective, TEXTS, formula, make)
    nothing_moves(objective, make, TEXTS)


@pytest.mark.parametrize("make", [Bag, Writer])
def test_span_corruption(make: Callable[[], Any]) -> None:
    batch = batch_of([30, 21, 2, 0, 9], labelled=False, vocabulary=40)
    objective = SpanCorruption(range(40, 50), rate=0.3, mean_span=2.0)
    texts, targets = objective.corrupt(batch)
    for row, (text, target) in enumerate(zip(texts, targets, strict=True)):
        whole = batch.tokens[row, : batch.lengths[row]].tolist()
        if len(whole) < 4:
            assert text == whole and target == []
            continue
        assert target[0] == 3 and target[-1] == 4
        spans: dict[int, list[int]] = {}
        for token in target[1:-1]:
            if token >= 40:
                sentinel = token
                spans[sentinel] = []
            else:
                spans[sentinel].append(token)
        assert list(spans) == list(range(40, 40 + len(spans))), "sentinels come in order"
        rebuilt = [t for token in text for t in spans.get(token, [token])]
        assert rebuilt == whole and all(spans.values())
        inner = len(whole) - 2
        assert sum(map(len, spans.values())) == round(0.3 * inner)
        assert len(spans) == max(1, round(round(0.3 * inner) / 2.0))
        assert text[1] < 40, "a text does not begin with a span"

    def formula(model: Any) -> Tensor:
        return torch.stack([t for text, target in zip(texts, targets, strict=True) if target
                            for t in written(model, text, target)]).mean()

    agree(objective, batch, formula, make)
    nothing_moves(objective, make, batch)
    assert objective.count(batch) == sum(max(0, len(t) - 1) for t in targets)
    with pytest.raises(ValueError, match="sentinels must be at least 4 for a text of 28 tokens"):
        SpanCorruption([40], rate=0.3, mean_span=2.0)(make(), batch)


def test_span_extraction() -> None:
    texts = [([3, 7, 8, 9, 4], (1, 3)), ([3, 4], (0, 0)), ([3, 9, 6, 4], (2, 2))]
    batch = collate_spans(texts, [0, 1, 2])
    objective = SpanExtraction()

    def formula(model: Bag) -> Tensor:
        terms = []
        for text, (start, end) in texts:
            logits = model.span_logits(torch.tensor([text]), torch.tensor([len(text)]))[0]
            terms.append(-(log_p(logits[:, 0])[start] + log_p(logits[:, 1])[end]) / 2)
        return torch.stack(terms).mean()

    agree(objective, batch, formula)
    nothing_moves(objective, Bag, batch)
    batch.spans = torch.tensor([[1, 3], [0, 2], [2, 2]])
    with pytest.raises(ValueError, match="spans must lie inside their texts"):
        objective(Bag(), batch)
    with pytest.raises(ValueError, match="expected a batch with spans, got None"):
        objective(Bag(), TEXTS)


def test_contrastive() -> None:
    def make() -> Bag:
        return Bag(dropout=0.3)

    def formula(model: Bag) -> Tensor:
        views = []
        for index in (0, 1):
            with sample_rows(UNEQUAL.sample_ids), view(index):
                hidden = model.encode(UNEQUAL.tokens, UNEQUAL.lengths)
            rows = [torch.cat([h[:n].mean(0), h[:n].amax(0)])
                    for h, n in zip(hidden, UNEQUAL.lengths.tolist(), strict=True) if n]
            views.append([row / row.norm() for row in rows])
        terms = []
        for i, own in enumerate(views[0]):
            similar = torch.stack([own @ other / 0.2 for other in views[1]])
            terms.append(-log_p(similar)[i])
        return torch.stack(terms).mean()

    # cosines of 12 elements, off by 12 · 2^-24, times 5 of the temperature: below the terms' own
    agree(Contrastive(temperature=0.2), UNEQUAL, formula, make)
    nothing_moves(Contrastive(), make, UNEQUAL)


def test_pseudo_label_and_consistency() -> None:
    for objective in (PseudoLabel(0.32), Consistency(0.32, 0.3, 0.3)):
        read = UNEQUAL if isinstance(objective, PseudoLabel) else augment(UNEQUAL, 0.3, 0.3)
        p = log_p(Bag().classify(UNEQUAL.tokens, UNEQUAL.lengths)).exp().detach()
        sure = [i for i in range(5) if UNEQUAL.lengths[i] and float(p[i].max()) >= 0.32]
        assert 0 < len(sure) < 4

        def formula(model: Bag, read: Batch = read, sure: list[int] = sure,
                    p: Tensor = p) -> Tensor:
            rows = log_p(model.classify(read.tokens, read.lengths))
            return -torch.stack([rows[i, int(p[i].argmax())] for i in sure]).sum() / 4

        agree(objective, UNEQUAL, formula)
        nothing_moves(objective, Bag, UNEQUAL)


def test_uda() -> None:
    objective, strong = UDA(0.4, 0.32, 0.3, 0.3), augment(UNEQUAL, 0.3, 0.3)
    p = log_p(Bag().classify(UNEQUAL.tokens, UNEQUAL.lengths)).exp().detach()
    sharp = p**2.5 / (p**2.5).sum(-1, keepdim=True)

    def formula(model: Bag) -> Tensor:
        rows = log_p(model.classify(strong.tokens, strong.lengths))
        terms = [(sharp[i] * (sharp[i].log() - rows[i])).sum() for i in range(5)
                 if UNEQUAL.lengths[i] and float(p[i].max()) > 0.32]
        assert 0 < len(terms) < 4
        return torch.stack(terms).sum() / 4

    agree(objective, UNEQUAL, formula)
    nothing_moves(objective, Bag, UNEQUAL)


def test_entropy() -> None:
    def formula(model: Bag) -> Tensor:
        rows = log_p(model.classify(UNEQUAL.tokens, UNEQUAL.lengths))
        return torch.stack([-(rows[i].exp() * rows[i]).sum() for i in (0, 1, 3, 4)]).mean()

    agree(EntropyMinimization(), UNEQUAL, formula)
    nothing_moves(EntropyMinimization(), Bag, UNEQUAL)


def test_mean_teacher_and_its_teacher() -> None:
    def moved(model: Bag, steps: int) -> Bag:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * steps)
        return model

    objective = MeanTeacher(decay=0.6)
    objective(Bag(), UNEQUAL)  # the teacher starts as the student
    for step in (1, 2, 3):
        objective.end_step(moved(Bag(), step))
    # α = 1/2, then 0.6 and 0.6: of the offsets 0, 0.1, 0.2, 0.3
    offset = 0.6 * (0.6 * 0.05 + 0.4 * 0.2) + 0.4 * 0.3
    teacher = moved(Bag(), 0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(offset)
        wanted = log_p(teacher.classify(UNEQUAL.tokens, UNEQUAL.lengths)).exp()

    def formula(model: Bag) -> Tensor:
        p = log_p(model.classify(UNEQUAL.tokens, UNEQUAL.lengths)).exp()
        return torch.stack([((p[i] - wanted[i]) ** 2).sum() for i in (0, 1, 3, 4)]).mean()

    agree(objective, UNEQUAL, formula)
    nothing_moves(objective, Bag, UNEQUAL)
    other = MeanTeacher(decay=0.6)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other(Bag(), UNEQUAL).loss, objective(Bag(), UNEQUAL).loss)


def test_virtual_adversarial() -> None:
    """The direction by fp64 autograd of the formula itself, from the objective's random vector."""
    from lowp.hybrid.random import normals, stream_id
    from lowp.key import Role

    batch = batch_of([7, 12, 0, 9, 2], labelled=False)
    weights = torch.rand(VOCABULARY) + 0.1
    objective = VirtualAdversarial(epsilon=2.0, xi=0.3, frequencies=weights)
    width, n = 6, batch.tokens.shape[1]
    d = normals(batch.sample_ids, n * width, 0, 1, stream_id("virtual_adversarial"),
                Role.AUGMENTATION).double().view(5, n, width)
    ordinary = (batch.tokens >= 5)[..., None]

    def parts(model: Bag) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        f = (weights / weights.sum()).double()[:, None]
        table = model.embedding.weight.detach()
        deviation = (f * (table - (f * table).sum(0)) ** 2).sum(0).sqrt()
        clean = log_p(model.classify(batch.tokens, batch.lengths)).detach()

        def divergence(shift: Tensor) -> Tensor:
            embedded = model.embedding(batch.tokens) + shift * deviation
            hidden = torch.tanh(embedded.cumsum(1) / torch.arange(1, n + 1)[:, None])
            terms = []
            for i, length in enumerate(batch.lengths.tolist()):
                if length:
                    rows = log_p(hidden[i, :length].mean(0) @ model.classes.t())
                    terms.append((clean[i].exp() * (clean[i] - rows)).sum())
            return torch.stack(terms)

        return deviation, divergence

    def unit(x: Tensor) -> Tensor:
        x = torch.where(ordinary, x, 0)
        return x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-300)

    def formula(model: Bag) -> Tensor:
        _, divergence = parts(model)
        start = unit(d).requires_grad_()
        (g,) = torch.autograd.grad(divergence(0.3 * start).sum(), start)
        return divergence(2.0 * unit(g)).mean()

    # The direction comes from gradients of about 0.01, off by 60 · 2^-24 = 4e-6: of each unit
    # vector by 4e-4, which 2 · KL's slope, below 2, makes 2e-3 in the loss and the gradients.
    agree(objective, batch, formula, close=2e-3)
    nothing_moves(objective, Bag, batch)
    model = Bag()
    weakest = 0.3 * unit(torch.randn(5, n, width, dtype=torch.float64))
    strongest = float(objective(model, batch).loss.detach())
    assert strongest > 2 * float(parts(model)[1](2.0 / 0.3 * weakest).mean().detach()), \
        "the direction found is worse than a random one of the same length"


def test_virtual_adversarial_leaves_accumulated_gradients_alone() -> None:
    model, batch = Bag(dropout=0.4), batch_of([7, 12, 9], labelled=False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    loss = VirtualAdversarial()(model, batch).loss
    assert all(bool((p.grad == 7).all()) for p in model.parameters() if p.grad is not None)
    assert model.training and model.dropout.training, "dropout was off inside only"
    loss.backward()
    assert bool((model.classes.grad != 7).any())


def test_freematch_penalty_has_its_formula() -> None:
    threshold = FreeMatch(CLASSES, momentum=0.9, fairness=0.5)
    batch = batch_of([7, 12, 5, 9, 6, 8], labelled=False)
    q = log_p(Bag().classify(batch.tokens, batch.lengths)).exp().detach()
    tau = 0.9 / CLASSES + 0.1 * q.amax(-1).mean()
    p = 0.9 / CLASSES + 0.1 * q.mean(0)
    h = 0.9 / CLASSES + 0.1 * torch.bincount(q.argmax(-1), minlength=CLASSES) / 6
    sure = [i for i in range(6) if q[i].max() >= p[q[i].argmax()] / p.max() * tau]
    assert len(sure) > 1

    def formula(model: Bag) -> Tensor:
        rows = log_p(model.classify(batch.tokens, batch.lengths))
        main = -torch.stack([rows[i, int(q[i].argmax())] for i in sure]).sum() / 6
        trained = rows[sure].exp()
        histogram = torch.bincount(trained.argmax(-1), minlength=CLASSES) / len(sure)
        used = histogram > 0
        a = (p / h) / (p / h).sum()
        b = torch.where(used, trained.mean(0) / histogram.clamp(min=1e-9), 0)
        b = b / b.sum()
        return main + 0.5 * (a * (b + 1e-12).log()).sum()

    agree(PseudoLabel(threshold), batch, formula)
