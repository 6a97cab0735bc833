"""report: every figure against one that is computed another way, and nothing changed by looking."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn
from typer.testing import CliRunner

import lowp
from lowp import cli
from lowp.hybrid.config import resolve
from lowp.hybrid.curves import draw_overlay
from lowp.hybrid.experiment import train
from lowp.hybrid.run import RunFolder
from lowp.key import clock
from lowp.quality import cosine, exact_step, fidelity, lost_updates
from lowp.recipe import Product
from tests.tensors import same_bits


def model_and_batch(precision: Any = "int8") -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        lowp.Linear(64, 96, precision=precision, activation="gelu", name="0"), nn.LayerNorm(96),
        lowp.Linear(96, 32, precision=precision, name="2"), nn.Linear(32, 4))
    return model, torch.randn(48, 64)


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_figures_by_another_way() -> None:
    model, x = model_and_batch()
    found = lowp.report(model, x, square)
    first, second = found.layers
    assert [first.fqn, second.fqn] == ["0", "2"] and first.rows == 48
    assert first.shape == (96, 64) and first.recipe == "int8"
    q = lowp.quantize(x)
    error = x.double() - lowp.dequantize(q).double()
    assert first.fidelity["x"].sqnr == pytest.approx(
        float(10 * torch.log10(x.double().square().sum() / error.square().sum())))
    assert first.fidelity["x"].saturated == pytest.approx(
        float((q.codes.abs() == 127).float().mean()))
    # 127 / amax per row of 64 Gaussians, amax about 2.6 sigma: noise 1/12 of a step squared.
    assert 40 < first.fidelity["w"].sqnr < 50 and first.fidelity["dy"].underflowed < 0.2
    plain = copy.deepcopy(model)
    square(model, x).backward()
    for layer in (plain[0], plain[2]):
        layer.recipe = lowp.recipe.RECIPES["fp32"]
    square(plain, x).backward()
    for index, layer in ((0, first), (2, second)):
        low, exact = model[index].weight.grad.flatten(), plain[index].weight.grad.flatten()
        assert layer.gradient_cosine == pytest.approx(
            float(nn.functional.cosine_similarity(low, exact, dim=0)), abs=1e-6)
        assert layer.gradient_cosine < 1
        w = model[index].weight.detach()
        stored = w.bfloat16()
        moved = model[index].weight.grad.sign() * 1e-3
        after = (stored.float() - moved).bfloat16()
        assert layer.lost_updates == pytest.approx(
            float((after == stored)[moved != 0].float().mean()), abs=2e-3)
    assert found.loss == pytest.approx(float(square(model, x)))
    assert found.loss_fp32 == pytest.approx(float(square(plain, x)))
    held = second.cost
    assert held is not None and held.weight == held.gradient == 4 * (96 * 32 + 32)
    # int8 keeps the input, in bf16's place the fp32 it came in, and the 8 bytes of the step
    assert held.saved == 4 * 48 * 96 + 8
    assert 0 < held.measured < 1 and 0 < held.predicted < 1
    assert found.unmeasured == [("3", "not converted: nn.Linear")]


def test_backends_and_reasons() -> None:
    model, x = model_and_batch("bf16")
    with lowp.backend("reference"):
        found = lowp.report(model, x, square)
    assert {layer.backend for layer in found.layers} == {"reference"}
    assert [c["op"] for c in found.layers[0].backends] == ["linear", "linear_dgrad", "linear_wgrad"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [lowp.optim.AdamW, torch.optim.AdamW, lowp.optim.SGD])
def test_nothing_is_changed(kind: Any, dtype: torch.dtype) -> None:
    model, x = model_and_batch()
    model, x = model.to(dtype), x.to(dtype)
    optimizer = kind(model.parameters(), lr=1e-2)
    for _ in range(2):
        square(model, x).backward()
        optimizer.step()
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    grads = [p.grad.clone() for p in model.parameters()]
    step, random = int(clock.step), torch.get_rng_state()
    found = lowp.report(model, x, square, optimizer=optimizer)
    assert found.update == f"the next step of {kind.__name__}"
    assert int(clock.step) == step and torch.equal(torch.get_rng_state(), random)
    assert all(map(same_bits, model.state_dict().values(), kept[0].values()))
    assert all(map(same_bits, [p.grad for p in model.parameters()], grads))
    for index, state in kept[1]["state"].items():
        for name, value in state.items():
            now = optimizer.state_dict()["state"][index][name]
            assert same_bits(now, value) if isinstance(value, Tensor) else now == value
    assert [m.recipe.name for m in (model[0], model[2])] == ["int8", "int8"]
    assert not model[0]._forward_hooks


def test_exact_step_is_the_unrounded_update() -> None:
    model, _ = model_and_batch()
    wide = copy.deepcopy(model)
    model.to(torch.bfloat16)
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        p.data = q.float()
    for network in (wide, model):
        for p in network.parameters():
            p.grad = torch.full_like(p, 0.25)
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-4)
    moves = exact_step(lowp.optim.SGD(model.parameters(), lr=1e-4))
    optimizer.step()
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        assert same_bits(moves[q][1], p.detach())
        assert q.dtype == torch.bfloat16
    # 1e-4 · 0.25 is below half an ulp of a bf16 at 0.01 (2^-15): nearly all such updates are lost
    weight = model[0].weight
    lost = lost_updates(*moves[weight], weight.dtype)
    assert lost is not None and lost == pytest.approx(
        float((weight.detach().float().abs() > 0.0065).float().mean()), abs=0.1)


def test_formats() -> None:
    key = lowp.Key()
    x = torch.tensor([[1.0, -1e-9, 3e38, 70000.0]])
    assert fidelity(x, Product("fp32"), "left", key) == (math.inf, 0.0, 0.0)
    half = fidelity(x, Product("fp16"), "left", key)
    assert half.saturated == 0.5 and half.underflowed == 0.25 and half.sqnr == -math.inf
    whole = fidelity(torch.tensor([[127.0, -3.0, 0.0]]), Product("int8"), "left", key)
    assert whole == (math.inf, pytest.approx(1 / 3), 0.0)
    assert fidelity(x[:0], Product("int8"), "left", key).sqnr == math.inf
    assert cosine(x, None) is None and cosine(x, torch.zeros_like(x)) is None
    assert cosine(x[:, :2], 2 * x[:, :2]) == pytest.approx(1)
    assert lost_updates(x, x, torch.float32) is None


def test_output_forms(tmp_path: Path) -> None:
    model, x = model_and_batch()
    found = lowp.report(model, x, square)
    data = json.loads(found.to_json())
    assert data["layers"][0]["fidelity"]["x"]["sqnr"] == found.layers[0].fidelity["x"].sqnr
    text = str(found)
    assert "int8" in text and "updates: Adam's first step with rate 0.001" in text
    found.draw(tmp_path / "map.png")
    picture = imread(tmp_path / "map.png")
    assert picture.shape[1] > 400 and len({tuple(p) for p in picture[:, ::7].reshape(-1, 4)}) > 20


def test_batches_of_every_form_and_frozen_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lowp.Linear(8, 8, precision="bf16")
            self.unused = lowp.Linear(8, 8)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return (scale * self.inner(x)).sum()

    model, x = Model(), torch.randn(4, 8)
    for batch in (x, (x, 2.0), {"x": x, "scale": 2.0}):
        found = lowp.report(model, batch)
        assert [layer.fqn for layer in found.layers] == ["inner"]
        assert found.unmeasured == [("unused", "the batch did not reach it")]
    model.inner.weight.requires_grad_(False)
    layer = lowp.report(model, x).layers[0]
    assert layer.gradient_cosine is None and layer.lost_updates is None
    with pytest.raises(ValueError, match=r"scalar loss .* got a tensor of shape \(4, 8\)"):
        lowp.report(model, x, lambda m, b: m.inner(b))
    with pytest.raises(ValueError, match="expected a model with lowp layers, got none in Linear"):
        lowp.report(nn.Linear(2, 2), x)


def test_transformers_output_has_its_loss() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = lowp.convert(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)), "int8")
    tokens = torch.randint(0, 64, (2, 12))
    found = lowp.report(model, {"input_ids": tokens, "labels": tokens})
    assert [layer.fqn.rpartition(".")[2] for layer in found.layers] == [
        "c_attn", "c_proj", "c_fc", "c_proj"]
    assert found.layers[0].shape == (96, 32) and found.layers[0].gradient_cosine > 0.99


def test_commands(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(
        f"{'warm sun' if n % 2 else 'cold rain'} number {n},{n % 2}\n" for n in range(60)))
    before = torch.get_num_threads()
    for seed in (0, 1):
        settings = resolve({
            "data": {"path": str(data), "vocab_size": 64, "max_length": 8, "labels": 20,
                     "tokenizer": "word"},
            "model": {"kind": "transformer", "width": 16, "heads": 2, "layers": 1}, "steps": 4,
            "batch_size": 4, "ratio": 1, "eval_every": 2, "checkpoint_every": 2, "seed": seed,
            "threads": 1})
        train(RunFolder.create(tmp_path / f"run{seed}", settings))
    run = str(tmp_path / "run0")
    result = CliRunner().invoke(cli.app, ["report", run], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "blocks.0.qkv" in result.output and "the next step of AdamW" in result.output
    layers = json.loads((tmp_path / "run0" / "report.json").read_text())["layers"]
    assert {"head", "blocks.0.up"} <= {layer["fqn"] for layer in layers}
    assert imread(tmp_path / "run0" / "report.png").size
    as_json = CliRunner().invoke(cli.app, ["report", run, "--json"])
    assert json.loads(as_json.output)["layers"]
    picture = tmp_path / "both.png"
    result = CliRunner().invoke(cli.app, ["compare", run, str(tmp_path / "run1"),
                                          "--results", str(picture)])
    assert result.exit_code == 0 and imread(picture).shape[1] > 1000
    for words, message in ((["compare", run], "two or more"),
                           (["compare", run, run], "two or more"),
                           (["report", str(tmp_path / "none")], "holds no run")):
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 2 and message in result.output
    torch.set_num_threads(before)


def test_overlay_of_runs_with_different_objectives(tmp_path: Path) -> None:
    runs = {
        "a": [{"step": s, "objectives": {"supervised": {"loss": 1 / s}}} for s in (1, 2, 3)],
        "b": [{"step": 2, "eval": {"accuracy": 0.5, "bad": math.nan}},
              {"step": 3, "objectives": {"supervised": {"loss": "nan"}}}],
    }
    draw_overlay(runs, tmp_path / "some.png")
    draw_overlay({}, tmp_path / "none.png")
    assert imread(tmp_path / "some.png").shape[1] > imread(tmp_path / "none.png").shape[1]
