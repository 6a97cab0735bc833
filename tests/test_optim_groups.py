"""Groups of parameters: each by its own options, all clipped by one norm."""

from __future__ import annotations

import pytest
import torch

from lowp import optim
from lowp.ops.adamw import adamw
from tests.tensors import same_bits
from tests.updates import EMPTY

FAMILY = ("SGD", "Adam", "AdamW", "Lion", "Adafactor", "Muon")
CHANGED = {"lr": 3e-3, "weight_decay": 0.3, "maximize": True, "rounding": "nearest",
           "state_rounding": "nearest", "state_dtype": "int8", "seed": 5, "master": "kahan"}


def optimizer_of(name, groups, **options):
    base = {"lr": 1e-2, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    return getattr(optim, name)(groups, **{**base, **options})


def matrices(*names):
    """Equal matrices with names, large enough for 8-bit states."""
    value = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    return {name: value.clone().requires_grad_() for name in names}


def train(named, *optimizers):
    for step in range(3):
        for name, p in named.items():
            generator = torch.Generator().manual_seed(10 * step + ord(name))
            p.grad = torch.randn(p.shape, generator=generator).bfloat16() * (1 + 9 * (name == "b"))
        for optimizer in optimizers:
            optimizer.step()


def same(optimizer, p, other, q):
    a, b = optimizer.state[p], other.state[q]
    return same_bits(p.detach(), q.detach()) and a.keys() == b.keys() and all(
        same_bits(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


@pytest.mark.parametrize("option", CHANGED)
@pytest.mark.parametrize("name", FAMILY)
def test_a_group_is_updated_by_its_own_options(name, option):
    """As by an optimizer of its own with these options, which change something."""
    change = {option: CHANGED[option]}
    together, apart, unchanged = (matrices("a", "b") for _ in range(3))
    both = optimizer_of(name, [{"params": [("a", together["a"])]},
                               {"params": [("b", together["b"])], **change}])
    first = optimizer_of(name, [("a", apart["a"])])
    second = optimizer_of(name, [("b", apart["b"])], **change)
    plain = optimizer_of(name, list(unchanged.items()))
    for named, optimizers in ((together, [both]), (apart, [first, second]), (unchanged, [plain])):
        train(named, *optimizers)
    assert same(both, together["a"], first, apart["a"])
    assert same(both, together["b"], second, apart["b"])
    without_effect = name == "Adafactor" and option.startswith("state")  # its states are fp32
    assert same(second, apart["b"], plain, unchanged["b"]) == without_effect


@pytest.mark.parametrize("name", FAMILY)
def test_groups_are_clipped_together(name):
    """By the norm of all gradients, whatever the grouping."""
    together, apart, alone = (matrices("a", "b") for _ in range(3))
    one = optimizer_of(name, list(together.items()), clip_grad_norm=1.0)
    two = optimizer_of(name, [{"params": [entry]} for entry in apart.items()], clip_grad_norm=1.0)
    free = optimizer_of(name, list(alone.items()))
    for named, optimizer in ((together, one), (apart, two), (alone, free)):
        train(named, optimizer)
    for key in "ab":
        assert same(one, together[key], two, apart[key])
        assert not same(one, together[key], free, alone[key])


@pytest.mark.parametrize("first", ("a", "b"))
def test_the_norm_is_of_all_groups(first):
    """SGD moves by the clipped gradient: by a norm of 1 in all."""
    named = {k: p.float().detach().requires_grad_() for k, p in matrices("a", "b").items()}
    start = {k: p.detach().clone() for k, p in named.items()}
    order = [first, "b" if first == "a" else "a"]
    optimizer = optim.SGD([{"params": [(k, named[k])]} for k in order], lr=1.0, clip_grad_norm=1.0)
    for k, p in named.items():
        p.grad = torch.full(p.shape, 1.0 if k == "a" else 10.0)
    optimizer.step()
    moved = torch.cat([(named[k].double() - start[k].double()).flatten() for k in "ab"])
    # an update rounds a weight below 8 by 2^-22 at most, which 24,000 elements share
    assert abs(moved.norm().item() - 1) <= 24_000**0.5 * 2.0**-22 + 1e-6


def test_a_rate_is_rounded_where_it_is_used():
    """Once, as a part of the step size, and not before: 0.1 is no fp32."""
    p = torch.randn(300).requires_grad_()
    q = p.detach().clone()
    m, v, step = torch.zeros(300), torch.zeros(300), torch.zeros(())
    optimizer = optim.AdamW([p], lr=0.1)
    for _ in range(20):
        p.grad = torch.randn(300)
        optimizer.step()
        adamw([q], [p.grad], [m], [v], [EMPTY], [EMPTY], [], [step],
              torch.tensor(0.1, dtype=torch.float64), 0.9, 0.999, 1e-2, 1e-8, False, "stochastic",
              "stochastic", 0, [0], [0], None, None)
        assert same_bits(p.detach(), q)
