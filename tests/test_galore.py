"""GaLore: states of low rank around any optimizer, and bases that need no communication."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lowp
from lowp.key import Role, clock, tensor_id
from lowp.optim import SGD, AdamW, GaLore
from lowp.optim.galore import random_basis
from lowp.reference.philox import draws
from tests.tensors import same_bits


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16)).to(dtype)


def backward(model: nn.Module, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 24, generator=generator)
    target = x @ torch.randn(24, 16, generator=torch.Generator().manual_seed(99)) / 5
    model.zero_grad()
    loss = (model(x.to(dtype)).float() - target).square().mean()
    loss.backward()
    return float(loss.detach())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def galore(model: nn.Module, **options: Any) -> GaLore:
    return GaLore(model.named_parameters(), **{
        "optimizer": AdamW, "lr": 1e-2, "rank": 4, "update_interval": 5, "scale": 1.0, **options})


def test_basis_is_orthonormal_and_a_function_of_its_key() -> None:
    p = random_basis(40, 8, 3, 11, 77)
    torch.testing.assert_close(p.t() @ p, torch.eye(8), rtol=0, atol=1e-6)
    assert same_bits(p, random_basis(40, 8, 3, 11, 77))
    for other in ((4, 11, 77), (3, 12, 77), (3, 11, 78)):
        assert (p.t() @ random_basis(40, 8, *other)).norm() < 0.9 * 8**0.5
    bits = draws(3, 11, 77, Role.PROJECTION, 640)
    assert not torch.equal(bits, draws(3, 11, 77, Role.WEIGHT, 640))


def test_basis_has_no_preferred_direction() -> None:
    """Uniform on the Stiefel manifold: E[P Pᵀ] = r/m I, of which a mean of n is within 5 sigma."""
    count, size, rank = 2000, 6, 2
    mean = sum(p @ p.t() for p in (random_basis(size, rank, 0, step, 5)
                                   for step in range(1, count + 1))) / count
    # An entry of P Pᵀ lies in [-1, 1] with variance at most r/m (1 - r/m).
    sigma = (rank / size * (1 - rank / size) / count) ** 0.5
    assert (mean - rank / size * torch.eye(size)).abs().max() < 5 * sigma


@pytest.mark.parametrize("basis", ["random", "svd"])
def test_one_step_by_definition(basis: str) -> None:
    model = network()
    optimizer = galore(model, basis=basis, scale=0.25, weight_decay=0.1)
    backward(model, 1)
    want = {}
    for name in ("0.weight", "2.weight"):
        p = model.get_parameter(name)
        g = p.grad if p.shape[0] <= p.shape[1] else p.grad.t()
        if basis == "random":
            q = random_basis(g.shape[0], 4, 0, 1, tensor_id(name))
        else:
            q = torch.linalg.svd(g)[0][:, :4]
        core = nn.Parameter(torch.zeros(4, g.shape[1]))
        core.grad = q.t() @ g
        torch.optim.AdamW([core], lr=1e-2, weight_decay=0.0).step()
        update = q @ core.detach()
        update = update if p.shape[0] <= p.shape[1] else update.t()
        want[name] = p.detach() * (1 - 1e-3) + 0.25 * update
    bias = copy.deepcopy(model[0].bias)
    bias.grad = model[0].bias.grad.clone()
    torch.optim.AdamW([bias], lr=1e-2, weight_decay=0.1).step()
    now = int(clock.step)
    optimizer.step()
    for name, value in want.items():
        found = model.get_parameter(name).detach()
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].bias, bias, rtol=1e-6, atol=1e-7)
    assert int(clock.step) == now + 1  # not one more for the wrapped optimizer


def test_full_rank_in_an_svd_basis_is_plain_sgd() -> None:
    """A gradient of rank 15 lies in its 15 first singular directions, and SGD turns with them."""
    plain, low = network(), network()
    with torch.no_grad():  # a gradient of rank at most 15 for the last layer
        for model in (plain, low):
            model[2].weight[15].zero_()
            model[2].bias[15].zero_()
    options = {"lr": 0.05}
    first = SGD(plain.parameters(), **options)
    second = GaLore(low.named_parameters(), SGD, rank=15, scale=1.0, basis="svd",
                    update_interval=1, **options)
    for step in range(5):
        for model, optimizer in ((plain, first), (low, second)):
            backward(model, step)
            for row in (model[2].weight.grad[15], model[2].bias.grad[15:]):
                row.zero_()
            model[0].weight.grad.zero_()
            optimizer.step()
    torch.testing.assert_close(low[2].weight, plain[2].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", [AdamW, SGD, torch.optim.AdamW, torch.optim.SGD],
                         ids=["lowp AdamW", "lowp SGD", "torch AdamW", "torch SGD"])
@pytest.mark.parametrize("basis", ["random", "svd"])
def test_it_trains_around_any_optimizer(inner: Any, basis: str) -> None:
    is_adam = "Adam" in inner.__name__
    model = network()
    losses = train(model, galore(model, optimizer=inner, lr=1e-2 if is_adam else 0.1, basis=basis,
                                 options={} if is_adam else {"momentum": 0.9}), range(150))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once_and_stochastically(dtype: torch.dtype) -> None:
    """Updates of a hundredth of an ulp: nearest loses them all, stochastic keeps their mean."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        ulp = torch.finfo(dtype).eps
        optimizer = GaLore([("w", weight)], torch.optim.SGD, lr=1e-9, rank=32, rounding=rounding,
                           weight_decay=1e9 * ulp / 100)
        for _ in range(100):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        moved[rounding] = float((1 - weight.detach().double()).mean())
    assert moved["nearest"] == 0
    # 100 steps of ulp/100 each (below 1 an ulp is half as large, so at most two moves an element):
    # the mean of 4096 elements has sigma below ulp / 64.
    assert moved["stochastic"] == pytest.approx(ulp, rel=5 / 64 + 0.01)


@pytest.mark.parametrize("basis", ["random", "svd"])
def test_resume_repeats_the_bits(basis: str) -> None:
    options = {"basis": basis, "options": {"state_dtype": "bf16"}}
    clock.set(1)
    model = network(torch.bfloat16)
    optimizer = galore(model, **options)
    train(model, optimizer, range(7))  # in the middle of an interval
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    want = train(model, optimizer, range(7, 15))
    clock.set(1)
    other = network(torch.bfloat16)
    again = galore(other, **options)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert int(clock.step) == 8
    assert train(other, again, range(7, 15)) == want
    assert all(map(same_bits, other.state_dict().values(), model.state_dict().values()))


def test_states_are_small_and_schedulers_work() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    optimizer = GaLore(model.parameters(), AdamW, rank=16)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    for _ in range(3):
        model(torch.randn(4, 256)).sum().backward()
        optimizer.step()
        scheduler.step()
    inner = optimizer.inner.state
    moments = [s["exp_avg"] for s in inner.values()]
    assert [tuple(m.shape) for m in moments] == [(16, 256)]
    assert optimizer.inner.param_groups[0]["betas"] != (0.9, 0.999)
    assert int(optimizer.state[model[0].weight]["step"]) == 3


def test_errors() -> None:
    p = [nn.Parameter(torch.randn(8, 8))]
    for options, message in (({"rank": 0}, "rank and update_interval"), ({"lr": -1.0}, "lr must"),
                             ({"basis": "dct"}, "basis must be random or svd, got 'dct'"),
                             ({"rounding": "up"}, "rounding must be")):
        with pytest.raises(ValueError, match=message):
            GaLore(p, SGD, **options)
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        GaLore([nn.Parameter(torch.randn(8, 8).double())], SGD, rank=2)
    with pytest.raises(RuntimeError, match="cannot be added"):
        GaLore(p, SGD, rank=2).add_param_group({"params": [nn.Parameter(torch.randn(2))]})
    assert lowp.optim.GaLore is GaLore
