"""Each objective against its formula written out, and with nothing to be learned."""

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
    ClassLM,
    Consistency,
    Contrastive,
    Denoising,
    EntropyMinimization,
    EvidenceBound,
    FlexMatch,
    FreeMatch,
    LSTMClassifier,
    MaskedLM,
    MeanTeacher,
    PseudoLabel,
    Ramp,
    SignalAnnealing,
    SpanCorruption,
    Supervised,
    TransformerEncoder,
    VirtualAdversarial,
)
from lowp.hybrid.mixing import GradNorm, Uncertainty
from lowp.hybrid.objectives.consistency import augment
from lowp.hybrid.objectives.thresholds import FixedThreshold, Labels
from lowp.hybrid.random import pass_index
from lowp.hybrid.tokenizer import CLS, EOS, MASK, PAD
from lowp.key import clock
from tests.text_toys import CLASSES, VOCABULARY, batch_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Means of at most 100 fp32 terms of size log 50 = 4, in another order: 100 * 2^-24 * 4 = 2.4e-5.
CLOSE = {"rtol": 0.0, "atol": 2.4e-5}


def lstm(dropout: float = 0.0) -> LSTMClassifier:
    return LSTMClassifier(VOCABULARY, CLASSES, embedding=8, hidden=8, dropout=dropout)


def transformer(dropout: float = 0.0) -> TransformerEncoder:
    return TransformerEncoder(VOCABULARY, CLASSES, width=8, depth=1, heads=2, max_length=64,
                              dropout=dropout)


def sharpen(model: LSTMClassifier | TransformerEncoder, text: int, batch: Batch) -> None:
    """Make the model nearly certain of class 2 on one text of the batch, and of no other."""
    with torch.no_grad():
        model.eval()
        hidden: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        model.classify(batch.tokens, batch.lengths)
        hook.remove()
        model.train()
        # weights that give 20 on this text and 0 on the others
        target = torch.zeros(len(batch.tokens))
        target[text] = 20.0
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[2] = torch.linalg.pinv(hidden[0]) @ target


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supervised_is_mean_cross_entropy(smoothing: float) -> None:
    model, batch = lstm(), batch_of([5, 9, 3])
    result = Supervised(label_smoothing=smoothing)(model, batch)
    logits = model.classify(batch.tokens, batch.lengths)
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    labels = [0, 1, 2]
    expected = torch.stack([
        -(1 - smoothing) * log_p[i, y] - smoothing * log_p[i].mean() for i, y in enumerate(labels)
    ]).mean()
    torch.testing.assert_close(result.loss, expected, **CLOSE)
    right = sum(int(logits[i].argmax()) == y for i, y in enumerate(labels))
    assert result.metrics["accuracy"] == pytest.approx(right / 3)
    with pytest.raises(ValueError, match="expected a batch with labels, got None"):
        Supervised()(model, batch_of([3], labelled=False))


def test_causal_lm_is_mean_cross_entropy_of_the_next_token() -> None:
    model, batch = lstm(), batch_of([5, 9, 1, 2, 0], labelled=False)
    result = CausalLM()(model, batch)
    logits = model.lm_logits(batch.tokens, batch.lengths)
    terms = []
    for row, length in enumerate(batch.lengths.tolist()):
        for t in range(length - 1):
            z = logits[row, t]
            terms.append(torch.logsumexp(z, 0) - z[batch.tokens[row, t + 1]])
    assert len(terms) == 4 + 8 + 1 == result.metrics["tokens"]
    torch.testing.assert_close(result.loss, torch.stack(terms).mean(), **CLOSE)
    with pytest.raises(ValueError, match="is_causal=True"):
        CausalLM()(transformer(), batch)


def test_masked_lm_is_mean_cross_entropy_of_what_was_hidden() -> None:
    model, batch = transformer(), batch_of([50, 60, 40, 0], labelled=False)
    objective = MaskedLM(rate=0.3)
    corrupted, chosen = objective.corrupt(batch, VOCABULARY)
    result = objective(model, batch)
    logits = model.lm_logits(corrupted, batch.lengths)
    terms = [
        torch.logsumexp(logits[i, t], 0) - logits[i, t, batch.tokens[i, t]]
        for i, t in chosen.nonzero().tolist()
    ]
    torch.testing.assert_close(result.loss, torch.stack(terms).mean(), **CLOSE)
    assert result.metrics["mask_rate"] == pytest.approx(len(terms) / (48 + 58 + 38))
    with pytest.raises(ValueError, match="is_causal=False"):
        MaskedLM()(lstm(), batch)


def test_masking_hides_as_bert_does() -> None:
    batch = batch_of([64] * 800, labelled=False)
    corrupted, chosen = MaskedLM(rate=0.15).corrupt(batch, VOCABULARY)
    special = batch.tokens < 5
    assert not chosen[special].any() and torch.equal(corrupted[~chosen], batch.tokens[~chosen])
    n, m = int((~special).sum()), int(chosen.sum())

    def near(count: int, trials: int, p: float) -> bool:
        """Within 5 deviations of the binomial: false once in 1.7 million."""
        return abs(count - trials * p) < 5 * math.sqrt(trials * p * (1 - p))

    assert near(m, n, 0.15)
    now, was = corrupted[chosen], batch.tokens[chosen]
    assert near(int((now == MASK).sum()), m, 0.8)
    # a random token of 45 is the old one once in 45 times
    assert near(int((now == was).sum()), m, 0.1 + 0.1 / 45)
    other = now[(now != MASK) & (now != was)]
    assert int(other.min()) >= 5 and int(other.max()) < VOCABULARY
    assert len(other.unique()) == VOCABULARY - 5


def test_masks_belong_to_sample_step_and_pass() -> None:
    objective = MaskedLM(rate=0.5)
    batch = batch_of([40, 30, 20], labelled=False)
    corrupted, _ = objective.corrupt(batch, VOCABULARY)
    assert torch.equal(corrupted, objective.corrupt(batch, VOCABULARY)[0])
    part = Batch(batch.tokens[1:, :30], batch.lengths[1:], None, batch.sample_ids[1:])
    assert torch.equal(corrupted[1:, :30], objective.corrupt(part, VOCABULARY)[0])
    others = [MaskedLM(rate=0.5, seed=1).corrupt(batch, VOCABULARY)[0]]
    with pass_index(1):
        others.append(objective.corrupt(batch, VOCABULARY)[0])
    clock.advance()
    others.append(objective.corrupt(batch, VOCABULARY)[0])
    assert all(not torch.equal(corrupted, other) for other in others)


@pytest.mark.parametrize("make", [lstm, transformer])
def test_pseudo_label_counts_the_confident_over_all(make: Callable[..., Any]) -> None:
    model, batch = make(), batch_of([6, 9, 4, 0], labelled=False)
    sharpen(model, 1, batch)
    result = PseudoLabel(threshold=0.95)(model, batch)
    logits = model.classify(batch.tokens, batch.lengths)
    # three texts are not empty, and one of them is confident
    torch.testing.assert_close(result.loss, (torch.logsumexp(logits[1], 0) - logits[1, 2]) / 3,
                               **CLOSE)
    assert result.metrics["mask_rate"] == pytest.approx(1 / 3)
    assert result.metrics["label_entropy"] == 0 and "label_accuracy" not in result.metrics


def test_consistency_is_cross_entropy_of_the_strong_form_against_the_weak() -> None:
    model, batch = lstm(), batch_of([12, 20, 9])
    sharpen(model, 1, batch)
    objective = Consistency(threshold=0.95, drop=0.3, mask=0.3)
    result = objective(model, batch)
    strong = augment(batch, 0.3, 0.3)
    assert not torch.equal(strong.tokens, batch.tokens)
    logits = model.classify(strong.tokens, strong.lengths)
    expected = (torch.logsumexp(logits[1], 0) - logits[1, 2]) / 3
    torch.testing.assert_close(result.loss, expected, **CLOSE)
    assert result.metrics["label_accuracy"] == 0  # its label is 1


def test_labels_come_from_evaluation_mode_and_the_mode_is_restored() -> None:
    batch = batch_of([6, 9, 4])
    for training in (True, False):
        model = lstm(dropout=0.5).train(training)
        own = Labels(model, batch, FixedThreshold(0.0))
        assert model.training is training and bool(own.confident.all())
        assert not own.probabilities.requires_grad
        probabilities = model.eval().classify(batch.tokens, batch.lengths).softmax(-1)
        assert torch.equal(own.labels, probabilities.argmax(-1))
        confidence = float(probabilities.detach().amax(-1).mean())
        assert own.metrics["confidence"] == pytest.approx(confidence)


def test_the_mode_is_restored_when_the_model_fails() -> None:
    model = lstm().train()
    with pytest.raises(ValueError):
        Labels(model, Batch(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([9]), None,
                            torch.zeros(1, dtype=torch.int64)), FixedThreshold(0.5))
    assert model.training


def test_label_entropy_tells_collapse_from_balance() -> None:
    class Fixed:
        training = False

        def __init__(self, labels: list[int]) -> None:
            self.logits = 50.0 * torch.nn.functional.one_hot(torch.tensor(labels), CLASSES)

        def train(self, mode: bool = True) -> None:
            pass

        def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            return self.logits

    ones = torch.ones(4, dtype=torch.int64)
    batch = Batch(ones[:, None], ones, None, torch.arange(4))
    for labels, expected in (([3, 3, 3, 3], 0.0), ([0, 1, 2, 3], 1.0), ([0, 0, 2, 2], 0.5)):
        own = Labels(Fixed(labels), batch, FixedThreshold(0.9))  # type: ignore[arg-type]
        assert own.metrics["label_entropy"] == pytest.approx(expected)


CASES: list[tuple[Any, Callable[..., Any], Batch]] = [
    (Supervised(), lstm, batch_of([])),
    (CausalLM(), lstm, batch_of([1, 1], labelled=False)),
    (CausalLM(), lstm, batch_of([0, 0], labelled=False)),
    (MaskedLM(), transformer, batch_of([2, 2], labelled=False)),
    (MaskedLM(), transformer, batch_of([0, 0], labelled=False)),
    (PseudoLabel(1.0), lstm, batch_of([5, 4], labelled=False)),
    (Consistency(1.0), transformer, batch_of([5, 4], labelled=False)),
    (Consistency(0.0), lstm, batch_of([0, 0], labelled=False)),
    (PseudoLabel(FlexMatch(CLASSES, 9)), lstm, batch_of([0, 0], labelled=False)),
    (PseudoLabel(FreeMatch(CLASSES)), lstm, batch_of([0, 0], labelled=False)),
    (UDA(threshold=1.0), lstm, batch_of([5, 4], labelled=False)),
    (UDA(threshold=0.0), transformer, batch_of([0, 0], labelled=False)),
    (EntropyMinimization(), lstm, batch_of([0, 0], labelled=False)),
    (ClassLM(), lstm, batch_of([2, 1])),
    (EvidenceBound(), transformer, batch_of([2, 0], labelled=False)),
    (MeanTeacher(), transformer, batch_of([0, 0], labelled=False)),
    (VirtualAdversarial(), lstm, batch_of([0, 0], labelled=False)),
    (VirtualAdversarial(), transformer, batch_of([2, 1], labelled=False)),
    (Contrastive(), transformer, batch_of([9, 0], labelled=False)),
    (Denoising(), lstm, batch_of([1, 0], labelled=False)),
    (SpanCorruption([49]), lstm, batch_of([2, 3, 0], labelled=False)),
]


@pytest.mark.parametrize("objective, make, batch", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_learn_is_zero_with_a_zero_gradient(
        objective: Any, make: Callable[..., Any], batch: Batch, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    if batch.tokens.shape[0] == 0:
        batch.labels = torch.zeros(0, dtype=torch.int64)
    result = objective(model, batch)
    assert float(result.loss.detach()) == 0 and result.loss.dtype == torch.float32
    result.loss.backward()
    found = gradients(model)
    assert found and all(not grad.any() for grad in found)  # NaN would be "any" too
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("objective, make", [
    (Supervised(), lstm), (CausalLM(), lstm), (MaskedLM(0.5), transformer),
    (PseudoLabel(0.0), lstm), (Consistency(0.0), transformer), (MaskedLM(
        0.5, continues=torch.arange(VOCABULARY) % 2 == 0), transformer),
    (PseudoLabel(FreeMatch(CLASSES, fairness=0.0)), lstm), (UDA(threshold=0.0), transformer),
    (EvidenceBound(), transformer), (EvidenceBound(), lstm),
    (EntropyMinimization(), lstm), (MeanTeacher(), transformer), (MeanTeacher(), lstm),
    (VirtualAdversarial(), lstm), (VirtualAdversarial(), transformer), (Contrastive(), lstm),
    (Denoising(), lstm), (SpanCorruption(range(40, 50)), lstm),
    (Supervised(annealing=SignalAnnealing(1)), lstm),
])
def test_objectives_repeat_themselves_and_leave_torch_alone(
        objective: Any, make: Callable[..., Any]) -> None:
    model, batch = make(dropout=0.3), batch_of([9, 5, 12])
    state = torch.get_rng_state()
    losses = [objective(model, batch).loss for _ in range(2)]
    assert torch.equal(*losses) and losses[0].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    losses[0].backward()
    assert any(bool(grad.any()) for grad in gradients(model))
    with pass_index(1):
        assert not torch.equal(losses[0], objective(model, batch).loss)
    assert (objective.stream == "labelled") == (objective.name == "supervised")
    whole = objective(model.to(torch.bfloat16), batch)
    assert whole.loss.dtype == torch.float32 and bool(whole.loss.isfinite())


def test_augmentation_drops_hides_and_keeps_the_ends() -> None:
    batch = batch_of([64] * 300)
    strong = augment(batch, 0.25, 0.5, seed=4)
    # 62 ordinary tokens of each of 300 texts: 18600 trials of probability 3/4, deviation 59;
    # and as many hidden as kept tokens are by probability 1/2: deviation below 60. 5 deviations.
    kept = int(strong.lengths.sum()) - 2 * 300
    assert abs(kept - 18600 * 0.75) < 300
    assert abs(int((strong.tokens == MASK).sum()) - kept / 2) < 300
    for row, length in enumerate(strong.lengths.tolist()):
        tokens = strong.tokens[row]
        assert tokens[0] == CLS and tokens[length - 1] == EOS and not (tokens[length:] != PAD).any()
        rest = iter(batch.tokens[row].tolist())  # what is left is in the order of the text
        assert all(t in rest for t in tokens[:length].tolist() if t != MASK)
    assert torch.equal(augment(batch, 0.0, 0.0).tokens, batch.tokens)
    part = Batch(batch.tokens[5:7], batch.lengths[5:7], None, batch.sample_ids[5:7])
    assert torch.equal(augment(part, 0.25, 0.5, seed=4).tokens, strong.tokens[5:7])


def test_ramps() -> None:
    assert [Ramp("linear", 1, 3, 4)(step) for step in (0, 1, 2, 4, 9)] == [1, 1.5, 2, 3, 3]
    assert [Ramp("constant", 1, 3, 4)(step) for step in (1, 9)] == [3, 3]
    assert [Ramp("cosine", 1, 3, 4)(step) for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [1, 2 - 2**-0.5, 2, 3, 3])
    sigmoid = Ramp("sigmoid", 0, 2, 10)
    assert sigmoid(5) == pytest.approx(2 * math.exp(-5 * 0.25)) and sigmoid(10) == sigmoid(99) == 2
    assert [sigmoid(s) for s in range(11)] == sorted(sigmoid(s) for s in range(11))
    assert Ramp("linear", 1, 0, 2)(1) == 0.5


@pytest.mark.parametrize("make, message", [
    (lambda: Ramp("square"), "kind must be one of constant, linear, cosine, sigmoid, got 'square'"),
    (lambda: Ramp(steps=0), "steps must be at least 1, got 0"),
    (lambda: Ramp(end=-1.0), "end must be finite and at least 0"),
    (lambda: Ramp(start=math.inf), "start must be finite"),
    (lambda: Supervised(1.0), "label_smoothing must be in"),
    (lambda: MaskedLM(0.0), "rate must be in"),
    (lambda: PseudoLabel(1.5), "threshold must be in"),
    (lambda: Consistency(math.nan), "threshold must be in"),
    (lambda: Consistency(drop=1.0), "drop must be in"),
    (lambda: UDA(temperature=0.0), "temperature must be in"),
    (lambda: Contrastive(0.0), "temperature must be positive"),
    (lambda: MeanTeacher(1.0), "decay must be in"),
    (lambda: VirtualAdversarial(epsilon=0), "epsilon must be positive"),
    (lambda: VirtualAdversarial(xi=math.nan), "xi must be positive"),
    (lambda: VirtualAdversarial(iterations=0), "iterations must be at least 1"),
    (lambda: SpanCorruption([]), "expected a sentinel"),
    (lambda: Denoising(mask=-0.1), "mask must be in"),
    (lambda: SignalAnnealing(5, "cosine"), "kind of linear, log, exp"),
    (lambda: FlexMatch(4, 0), "samples must be at least 1"),
    (lambda: FreeMatch(1), "expected classes >= 2"),
    (lambda: GradNorm(["a"]), "at least 2 objectives"),
    (lambda: Uncertainty(["a", "a"]), "different"),
    (lambda: Uncertainty(["a"], lr=0), "lr must be positive"),
])
def test_bad_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
