"""lowp.LSTM: nn.LSTM in every way, with the input projections by a recipe."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import lowp
from lowp.hybrid import LSTMClassifier
from lowp.key import clock
from lowp.recurrence import last_rows, predecessors
from tests.tensors import FLOATS, same_bits
from tests.tolerances import chain_error

KINDS: dict[str, dict[str, Any]] = {
    "one layer": {}, "two layers, both ways": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "bidirectional": True}, "time first": {"batch_first": False},
}
LENGTHS = torch.tensor([9, 3, 7, 1, 7])


def pair(precision: Any, **options: Any) -> tuple[lowp.LSTM, nn.LSTM]:
    """A lowp LSTM and an fp64 nn.LSTM of the same weights."""
    settings = {"input_size": 48, "hidden_size": 40, "batch_first": True, **options}
    layer = lowp.LSTM(**settings, precision=precision, name="lstm")
    plain = nn.LSTM(**settings)
    plain.load_state_dict(layer.state_dict(), strict=True)
    return layer, plain.double()


def passes(layer: nn.LSTM, x: Any, hx: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    """Output, final states, and the gradients of input, initial states and parameters."""
    dtype = next(layer.parameters()).dtype
    layer.zero_grad()
    leaf = x.detach().to(dtype).requires_grad_()
    given: Any = leaf
    if layer.batch_first and leaf.shape[0] == len(LENGTHS):
        given = pack_padded_sequence(leaf, LENGTHS, batch_first=True, enforce_sorted=False)
    states = None if hx is None else [t.detach().to(dtype).requires_grad_() for t in hx]
    y, (h, c) = layer(given, None if states is None else tuple(states))
    outputs = [y.data if isinstance(y, PackedSequence) else y, h, c]
    generator = torch.Generator().manual_seed(7)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs)
    loss.backward()  # type: ignore[union-attr]
    return [*outputs, leaf.grad, *([s.grad for s in states or []]),
            *[p.grad for p in layer.parameters()]]  # type: ignore[list-item]


@pytest.mark.parametrize("batch", [5, 6], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["fp16", "bf16", "int8", "int8_full"])
def test_against_fp64(recipe: str, kind: str, batch: int) -> None:
    layer, plain = pair(recipe, **KINDS[kind])
    ways = (1 + layer.bidirectional) * layer.num_layers
    hx = (torch.randn(ways, batch, 40), torch.randn(ways, batch, 40))
    x = torch.randn(batch, 9, 48) if layer.batch_first else torch.randn(9, batch, 48)
    found, exact = passes(layer, x, hx), passes(plain, x, hx)
    # A projection's error passes a gate, whose slope is at most 1, and the forget gate, about 1/2
    # as the weights are drawn, hands it on for about two steps: as two products a layer.
    bound = chain_error(recipe, 2 * layer.num_layers)
    for got, want in zip(found, exact, strict=True):
        assert got.shape == want.shape
        assert float((got.double() - want).norm() / want.norm()) < bound


def test_recurrence_alone_is_fp32_exact() -> None:
    """Projections that bf16 holds (one-hot rows, bf16 weights) leave the error of fp32."""
    layer, plain = pair("bf16")
    with torch.no_grad():
        layer.weight_ih_l0.copy_(layer.weight_ih_l0.bfloat16().float())
    plain.load_state_dict(layer.state_dict())
    x = torch.nn.functional.one_hot(torch.arange(54) % 48, 48).float().view(6, 9, 48)
    found, exact = passes(layer, x), passes(plain, x)
    for index in (0, 1, 2, 5):  # outputs and states, and the gradient of weight_hh: no bf16 in them
        error = (found[index].double() - exact[index]).norm() / exact[index].norm()
        assert float(error) < chain_error("fp32", 1)


def test_fp32_is_nn_lstm_bit_for_bit() -> None:
    torch.manual_seed(3)
    plain = nn.LSTM(12, 10, 2, dropout=0.5, proj_size=4, bidirectional=True)
    torch.manual_seed(3)
    layer = lowp.LSTM(12, 10, 2, dropout=0.5, proj_size=4, bidirectional=True)
    assert repr(layer) == repr(plain) and list(layer.state_dict()) == list(plain.state_dict())
    x = torch.randn(5, 3, 12)
    outputs = []
    for module in (plain, layer):
        torch.manual_seed(4)
        outputs.append(module(x))
    assert same_bits(outputs[0][0], outputs[1][0])
    assert same_bits(outputs[0][1][1], outputs[1][1][1])


def test_state_dict_both_ways_and_copies() -> None:
    layer, _ = pair("int8", num_layers=2, bidirectional=True)
    nn.LSTM(48, 40, 2, bidirectional=True).load_state_dict(layer.state_dict(), strict=True)
    assert "precision=int8" in repr(layer) and isinstance(layer, nn.LSTM)
    x = torch.randn(6, 9, 48)
    want = passes(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(map(same_bits, passes(other, x), want))


def test_packed_equals_each_sequence_alone() -> None:
    layer, _ = pair("bf16", bidirectional=True)
    texts = [torch.randn(n, 48) for n in (4, 9, 1)]
    y, (h, c) = layer(pack_sequence(texts, enforce_sorted=False))
    padded, lengths = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    for row, text in enumerate(texts):
        alone, (h_one, c_one) = layer(text)
        torch.testing.assert_close(padded[row, : len(text)], alone)
        torch.testing.assert_close(h[:, row], h_one)
        torch.testing.assert_close(c[:, row], c_one)
    assert lengths.tolist() == [4, 9, 1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    layer, plain = pair("bf16")
    x = torch.randn(6, 9, 48)
    exact = passes(plain, x)
    found = passes(layer.to(dtype), x)
    bound = chain_error("bf16", 4)  # weights, input, projection and output rounded to at least bf16
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == dtype
        assert float((got.double() - want).norm() / want.norm()) < bound
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16


def test_frozen_and_empty_and_repeated_backward() -> None:
    layer, _ = pair("int8_full")
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(6, 9, 48, requires_grad=True)
    y, _ = layer(x)
    first = torch.autograd.grad(y.sum(), [x, layer.weight_ih_l0], retain_graph=True)
    clock.advance()
    second = torch.autograd.grad(y.sum(), [x, layer.weight_ih_l0])
    assert all(map(same_bits, first, second))
    empty, (h, _) = layer(torch.randn(0, 9, 48))
    assert empty.shape == (0, 9, 40) and h.shape == (1, 0, 40)
    with torch.no_grad():
        assert same_bits(layer(x)[0], lowp.LSTM.forward(layer, x)[0])


def test_dropout_between_layers() -> None:
    layer, _ = pair("bf16", num_layers=2, dropout=0.5)
    x = torch.randn(6, 9, 48)
    assert not same_bits(layer(x)[0], layer(x)[0])
    layer.eval()
    assert same_bits(layer(x)[0], layer(x)[0])


def test_compiles_around_the_recurrence() -> None:
    layer, _ = pair("bf16")
    compiled: Any = torch.compile(nn.Sequential(layer), backend="aot_eager")
    x = torch.randn(6, 9, 48)
    assert same_bits(compiled(x)[0], layer(x)[0])


def test_the_hybrid_classifier_has_it() -> None:
    assert type(LSTMClassifier(50, 2, precision="int8").lstm) is lowp.LSTM
    assert type(LSTMClassifier(50, 2, baseline=True).lstm) is nn.LSTM


def test_errors() -> None:
    with pytest.raises(ValueError, match="proj_size must be 0 with precision 'int8', got 3"):
        lowp.LSTM(4, 8, proj_size=3, precision="int8")
    with pytest.raises(ValueError, match="precision must be one of"):
        lowp.LSTM(4, 8, precision="int3")
    layer = lowp.LSTM(4, 8, precision="bf16")
    for shape in ((2, 3, 5), (4,), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"lowp\.LSTM: expected input"):
            layer(torch.randn(shape))
    with pytest.raises(ValueError, match="at least one time step"):
        layer(torch.randn(0, 3, 4))
    with pytest.raises(ValueError, match=r"expected h_0 \(1, 3, 8\), got \(1, 2, 8\)"):
        layer(torch.randn(5, 3, 4), (torch.zeros(1, 2, 8), torch.zeros(1, 3, 8)))
    x = torch.randn(5, 3, 4, requires_grad=True)
    grad = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_of_packed_steps() -> None:
    sizes = [3, 2, 2, 1]  # sequences of 4, 3 and 1 steps; rows 0-2, 3-4, 5-6, 7
    assert last_rows(sizes, False).tolist() == [7, 6, 2]
    assert last_rows(sizes, True).tolist() == [0, 1, 2]
    states = 3  # the initial ones come first
    assert predecessors(sizes, False).tolist() == [
        0, 1, 2, states + 0, states + 1, states + 3, states + 4, states + 5]
    assert predecessors(sizes, True).tolist() == [
        states + 3, states + 4, 2, states + 5, states + 6, states + 7, 1, 0]


def test_plan_names_it() -> None:
    plan = lowp.plan(nn.Sequential(nn.LSTM(4, 8), nn.Embedding(5, 4), nn.Bilinear(3, 3, 2)))
    assert [(e.fqn, e.converts) for e in plan] == [("0", False), ("2", False)]
    assert "lowp.LSTM" in plan[0].reason and plan[0].shape == (32, 4)
    assert plan[1].reason == "Bilinear holds 'weight' itself, outside any nn.Linear"
