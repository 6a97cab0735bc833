"""The text models: padding is never read, and every precision trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowp.optim
from lowp.hybrid import LSTMClassifier, TransformerEncoder
from lowp.hybrid.padding import pooled, valid_mask
from lowp.hybrid.random import pass_index, sample_rows
from lowp.key import tensor_id
from lowp.linear import Linear

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, CLASSES = 40, 3
Model = LSTMClassifier | TransformerEncoder
Maker = Callable[..., Model]


def lstm(**options: Any) -> LSTMClassifier:
    return LSTMClassifier(VOCABULARY, CLASSES, embedding=12, hidden=16, **options)


def both_ways(**options: Any) -> LSTMClassifier:
    return lstm(bidirectional=True, layers=2, **options)


def transformer(**options: Any) -> TransformerEncoder:
    return TransformerEncoder(VOCABULARY, CLASSES, width=16, depth=2, heads=2, max_length=12,
                              **options)


every_model = pytest.mark.parametrize("make", [lstm, both_ways, transformer])
language_models = pytest.mark.parametrize("make", [lstm, transformer])


def texts(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, VOCABULARY, (len(lengths), 12), generator=generator)[:, :width]
    counts = torch.tensor(lengths)
    return torch.where(valid_mask(counts, width), tokens, 0), counts


# fp32 sums of the same terms in another order: at most K = 64 terms deep (the MLP) over about ten
# layers of values of size 1, each off by K * 2^-24 = 4e-6 at the worst: 4e-5.
CLOSE = {"rtol": 0.0, "atol": 4e-5}


@every_model
def test_logits_depend_on_neither_order_nor_padding(make: Maker) -> None:
    model = make().eval()
    tokens, lengths = texts([4, 9, 1, 6], 9)
    expected = model.classify(tokens, lengths)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.classify(tokens[order], lengths[order]), expected[order],
                               **CLOSE)
    wider = torch.cat([tokens, torch.full((4, 3), 17)], dim=1)
    torch.testing.assert_close(model.classify(wider, lengths), expected, **CLOSE)
    for row in range(4):
        alone = model.classify(tokens[row : row + 1, : lengths[row]], lengths[row : row + 1])
        torch.testing.assert_close(alone, expected[row : row + 1], **CLOSE)


@every_model
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_is_never_read(make: Maker, poison: float) -> None:
    model = make(dropout=0.2)
    tokens, lengths = texts([4, 9, 0, 1, 6], 11)
    assert bool((tokens == 0).any())
    clean = model.classify(tokens, lengths)
    with torch.no_grad():
        model.embedding.weight[0] = poison
    logits = model.classify(tokens, lengths)
    assert torch.equal(logits, clean)
    (logits.square().sum() + model.encode(tokens, lengths).square().sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), name
    assert model.embedding.weight.grad is not None
    assert not model.embedding.weight.grad[0].any()


@every_model
def test_an_empty_text_is_classified_by_the_bias(make: Maker) -> None:
    model = make().eval()
    tokens, lengths = texts([3, 0], 5)
    torch.testing.assert_close(model.classify(tokens, lengths)[1], model.head.bias, **CLOSE)
    for width in (0, 5):
        nothing = torch.zeros(2, width, dtype=torch.int64)
        logits = model.classify(nothing, torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(logits, model.head.bias.expand(2, CLASSES), **CLOSE)
    logits.sum().backward()
    none = model.classify(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, CLASSES)


@every_model
def test_hidden_states_are_zero_on_padding(make: Maker) -> None:
    tokens, lengths = texts([4, 0, 7], 9)
    hidden = make().encode(tokens, lengths)
    assert hidden.shape[:2] == (3, 9)
    assert not hidden[~valid_mask(lengths, 9)].any() and hidden[0, :4].any()


def test_a_causal_model_does_not_see_the_next_token() -> None:
    model = lstm().eval()
    tokens, lengths = texts([9], 9)
    changed = tokens.clone()
    changed[0, 5] = 7 if int(tokens[0, 5]) != 7 else 8
    before, after = model.lm_logits(tokens, lengths), model.lm_logits(changed, lengths)
    assert torch.equal(before[0, :5], after[0, :5]) and not torch.equal(before[0, 5], after[0, 5])
    assert before.shape == (1, 9, VOCABULARY) and model.is_causal and not transformer().is_causal
    assert not both_ways().is_causal
    with pytest.raises(ValueError, match="bidirectional"):
        both_ways().lm_logits(tokens, lengths)


def test_the_packed_lstm_is_the_lstm_of_each_text() -> None:
    model = lstm().eval()
    tokens, lengths = texts([4, 9, 1], 9)
    hidden = model.encode(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model.lstm(model.embedding(tokens[row : row + 1, :length]))
        torch.testing.assert_close(hidden[row, :length], alone[0], **CLOSE)


def test_pooling_is_mean_and_maximum_of_what_is_valid() -> None:
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [9.0, 9.0]], [[5.0, 5.0]] * 3])
    found = pooled(hidden, torch.tensor([2, 0]))
    assert found.tolist() == [[2.0, -3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]]


@language_models
@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("fp16", torch.float32), ("bf16", torch.bfloat16),
    ("int8", torch.bfloat16), ("int8_full", torch.bfloat16), ("int8", torch.float32),
])
def test_every_precision_learns(make: Maker, precision: str, dtype: torch.dtype) -> None:
    model = make(precision=precision, dropout=0.0).to(dtype)
    tokens, lengths = texts([4, 9, 6, 7, 5, 8], 9)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = lowp.optim.AdamW(model.named_parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        logits = model.classify(tokens, lengths)
        assert logits.dtype == dtype
        words = model.lm_logits(tokens, lengths)[valid_mask(lengths, 9)]
        named = torch.nn.functional.cross_entropy(logits.float(), labels)
        told = torch.nn.functional.cross_entropy(words.float(), tokens[valid_mask(lengths, 9)])
        (named + told).backward()
        optimizer.step()
        losses.append((float(named.detach()), float(told.detach())))
    # It starts near log 3 = 1.1 and log 40 = 3.7, and there is nothing to generalize to.
    assert losses[0][0] > 0.9 and losses[0][1] > 3 and losses[-1][0] < 0.3 and losses[-1][1] < 1.5
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@language_models
def test_the_baseline_has_plain_layers_and_the_same_keys(make: Maker) -> None:
    ours, plain = make(precision="int8"), make(baseline=True)
    assert not any(isinstance(m, Linear) for m in plain.modules())
    plain.load_state_dict(ours.state_dict(), strict=True)
    same = make(precision="fp32")
    same.load_state_dict(ours.state_dict(), strict=True)
    tokens, lengths = texts([4, 9], 9)
    torch.testing.assert_close(same.eval()(tokens, lengths), plain.eval()(tokens, lengths), **CLOSE)
    linear = {n for n, m in ours.named_modules() if type(m) is Linear}
    assert linear == {
        n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert all(m.recipe.name == "int8" for m in ours.modules() if isinstance(m, Linear))


@every_model
def test_dropout_repeats_itself_and_leaves_torch_alone(make: Maker) -> None:
    model = make(dropout=0.3)
    tokens, lengths = texts([4, 9, 6], 9)
    state = torch.get_rng_state()
    first = model.classify(tokens, lengths)
    assert torch.equal(first, model.classify(tokens, lengths))
    with pass_index(1):
        assert not torch.equal(first, model.classify(tokens, lengths))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, model.eval().classify(tokens, lengths))


@every_model
def test_a_sample_drops_the_same_in_any_batch(make: Maker) -> None:
    model = make(dropout=0.3)
    tokens, lengths = texts([4, 9, 6], 9)
    ids = torch.tensor([5, 70, 900])
    with sample_rows(ids):
        whole = model.classify(tokens, lengths)
    for order in itertools.permutations(range(3), 2):
        part = torch.tensor(order)
        with sample_rows(ids[part]):
            found = model.classify(tokens[part], lengths[part])
        torch.testing.assert_close(found, whole[part], **CLOSE)


@every_model
def test_bad_batches_are_refused(make: Maker) -> None:
    model = make()
    tokens, lengths = texts([4, 9], 9)
    with pytest.raises(ValueError, match=r"expected tokens \[B, T\] and lengths \[B\]"):
        model.classify(tokens, lengths[:1])
    with pytest.raises(ValueError, match=r"lengths must be in 0\.\.9, got 4\.\.10"):
        model.classify(tokens, torch.tensor([4, 10]))
    with pytest.raises(TypeError, match="expected integer tokens"):
        model.classify(tokens.float(), lengths)


def test_the_transformer_refuses_long_texts_and_odd_heads() -> None:
    with pytest.raises(ValueError, match="at most max_length 12, got 13"):
        transformer().encode(torch.ones(1, 13, dtype=torch.int64), torch.tensor([13]))
    with pytest.raises(ValueError, match="heads must divide width 16, got 3"):
        TransformerEncoder(9, 2, width=16, heads=3)


def test_models_are_keyed_by_their_layers_names() -> None:
    names = [m.noise_id for m in transformer().modules() if isinstance(m, Linear)]
    assert len(set(names)) == len(names)
    assert names == [m.noise_id for m in transformer().modules() if isinstance(m, Linear)]
    assert tensor_id("blocks.0.qkv") in names
