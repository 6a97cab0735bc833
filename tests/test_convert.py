"""convert, plan and revert: in place, reversible, and careful with what is tied or a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowp
from lowp.key import tensor_id
from tests.tensors import same_bits


class Tied(nn.Module):
    """An embedding tied to a decoder, two layers that share a weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.decoder = nn.Linear(16, 50, bias=False)
        self.decoder.weight = self.embedding.weight
        self.lm_head = nn.Linear(16, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.embedding(tokens)))
        x = self.block(x)
        return self.decoder(x) + self.lm_head(x)


def test_default_rule_and_plan():
    model = Tied()
    before = dict(model.named_parameters())
    plan = lowp.plan(model, "int8")
    assert {e.fqn: e.converts for e in plan} == {
        "first": False, "second": False, "block.0": True, "block.2": True, "decoder": False,
        "lm_head": False,
    }
    reasons = {e.fqn: e.reason for e in plan}
    assert "tied" in reasons["decoder"] and "head" in reasons["lm_head"]
    assert "block.0" in str(plan) and type(model.block[0]) is nn.Linear
    assert lowp.convert(model, "int8") is model
    assert [type(m) is lowp.Linear for m in (model.first, model.block[0], model.block[2])] == [
        False, True, True]
    assert model.block[0].noise_id == tensor_id("block.0")
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[n] is after[n] for n in before)
    model(torch.tensor([[1, 2, 3]])).sum().backward()


def test_filter_replaces_the_rule():
    model = Tied()
    seen = []
    lowp.convert(model, "bf16", filter_fn=lambda m, fqn: seen.append((m, fqn)) or fqn == "lm_head")
    assert type(model.lm_head) is lowp.Linear and type(model.block[0]) is nn.Linear
    assert "block.2" in [fqn for _, fqn in seen]
    assert all(isinstance(m, nn.Linear) for m, _ in seen)
    every = lowp.convert(Tied(), "bf16", filter_fn=lambda m, fqn: True)
    assert every.first.weight is every.second.weight
    assert every.decoder.weight is every.embedding.weight


def test_revert_is_exact():
    model = Tied()
    tokens = torch.tensor([[3, 1, 4]])
    want, text, keys = model(tokens), repr(model), list(model.state_dict())
    hooks = []
    model.block[0].register_forward_hook(lambda *_: hooks.append(1))
    lowp.convert(model, 8)
    assert not same_bits(model(tokens), want)
    assert lowp.revert(model) is model
    assert type(model.block[0]) is nn.Linear and "recipe" not in vars(model.block[0])
    assert repr(model) == text and list(model.state_dict()) == keys
    assert same_bits(model(tokens), want)
    assert len(hooks) == 2


def test_convert_twice_replaces_the_recipe():
    model = lowp.convert(nn.Sequential(nn.Linear(8, 8)), "int8")
    assert lowp.convert(model, "bf16")[0].recipe.name == "bf16"


def test_errors_change_nothing():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="precision must be one of"):
        lowp.convert(model, "int3")
    assert type(model[0]) is nn.Linear
    fused = nn.Sequential(lowp.Linear(8, 8), lowp.Linear(8, 8, activation="relu"))
    with pytest.raises(ValueError, match="layer '1' has the fused activation 'relu'"):
        lowp.revert(fused)
    assert type(fused[0]) is lowp.Linear


def test_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), nn.MultiheadAttention(8, 2))
    plan = {e.fqn: e for e in lowp.plan(model)}
    assert not plan["0"].converts and "Special" in plan["0"].reason
    lowp.convert(model, "int8")
    assert type(model[0]) is Special
    x = torch.randn(3, 1, 8)
    assert model[1](x, x, x)[0].shape == x.shape


def test_root_and_explain():
    layer = lowp.convert(nn.Linear(8, 4), "int8")
    assert type(layer) is lowp.Linear
    text = str(lowp.explain(layer, torch.randn(2, 8)))
    assert "scaled_mm" in text and "linear_wgrad" in text and "cpu" in text
    with lowp.backend("reference"):
        assert "reference" in str(lowp.explain(layer, torch.randn(2, 8)))
    with pytest.raises(TypeError, match="expected a lowp layer, got Linear"):
        lowp.explain(nn.Linear(2, 2), torch.randn(1, 2))


def test_transformers_gpt2_conv1d():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 64, (3, 20))

    def loss_and_grads():
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    want_loss, want = loss_and_grads()
    keys = list(model.state_dict())
    lowp.convert(model, "int8")
    converted = [m for m in model.modules() if type(m).__module__ == "lowp.conv1d"]
    assert len(converted) == 8  # c_attn, c_proj, c_fc, c_proj of two blocks
    assert type(model.lm_head) is nn.Linear and list(model.state_dict()) == keys
    loss, grads = loss_and_grads()
    assert abs(loss - want_loss) < 0.02
    for got, exact in zip(grads, want, strict=True):
        assert (got - exact).norm() < 0.1 * exact.norm() + 1e-6
    lowp.revert(model)
    assert loss_and_grads()[0] == want_loss
    assert not [m for m in model.modules() if type(m).__module__ == "lowp.conv1d"]
