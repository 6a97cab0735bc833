"""Every optimizer: torch's update step by step, its own inputs, exact masters, odd tensors."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowp
from lowp import optim
from lowp.ops import muon as muon_op
from lowp.ops.adafactor import adafactor
from lowp.ops.adamw import adamw
from lowp.ops.lion import lion
from lowp.ops.muon import muon
from lowp.ops.sgd import sgd
from lowp.reference.stores import load_weight
from tests.tensors import same_bits
from tests.tolerances import ulp
from tests.updates import EMPTY

EXTRAS = {"rounding", "state_dtype", "state_rounding", "seed", "master", "clip_grad_norm",
          "maximize", "capturable"}
TORCHS = ("Adam", "AdamW", "SGD", "Adafactor", "Muon")


@pytest.mark.parametrize("name", TORCHS)
def test_signature_is_torchs_plus_keyword_only_extras(name):
    ours = inspect.signature(getattr(optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    assert [n for n in ours if n in theirs] == list(theirs)
    for n, parameter in theirs.items():
        assert ours[n].default == parameter.default and ours[n].kind == parameter.kind, n
    added = set(ours) - set(theirs)
    assert added <= EXTRAS
    assert all(ours[n].kind is inspect.Parameter.KEYWORD_ONLY for n in added)


@pytest.mark.parametrize("name", (*TORCHS, "Lion"))
def test_every_optimizer_has_all_extras(name):
    assert set(inspect.signature(getattr(optim, name)).parameters) >= EXTRAS


STEPS = [
    *[(name, o) for name in ("Adam", "AdamW") for o in (
        {}, {"lr": 1e-2, "weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True},
        {"betas": (0.8, 0.95), "eps": 1e-4}, {"weight_decay": 0.0}, {"lr": torch.tensor(1e-3)})],
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    *[("SGD", o) for o in (
        {}, {"lr": 1e-2, "weight_decay": 0.1}, {"momentum": 0.9}, {"maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5}, {"lr": torch.tensor(1e-3)})],
    *[("Adafactor", {"lr": 3e-3, **o}) for o in (
        {}, {"weight_decay": 0.1}, {"maximize": True}, {"beta2_decay": -1.0}, {"d": 1.5},
        {"eps": (1e-3, 1e-2)}, {"lr": torch.tensor(1e-3)})],
    *[("Muon", o) for o in (
        {}, {"weight_decay": 0.2}, {"momentum": 0.8}, {"nesterov": False}, {"ns_steps": 2},
        {"adjust_lr_fn": "match_rms_adamw"}, {"ns_coefficients": (3.4, -4.7, 2.0)})],
]


@pytest.mark.parametrize(("name", "options"), STEPS)
def test_a_step_is_torchs_within_2_ulp(name, options, monkeypatch):
    """Both start each of 20 steps from our weights and states, which are torch's by name.

    Weights are in [1, 2), so an ulp is 2^-23, and move by less than 1/16 a step. The decay is the
    same fp32 product on both sides, the last subtraction is rounded once on each: 1 ulp apart; the
    updates, about 20 roundings apart (sums of 6,300 squares in fp32: 10 more), add less than
    30 2^-24 / 16 < 1 ulp. Muon's orthogonal factor, which bf16 rounds, is bounded by a test of its
    own: here torch gets ours, when its input to it is ours but for rounding.
    """
    factors = []
    if name == "Muon":
        inner = muon_op.orthogonalize

        def ours_of(xs, *rest):
            mine = [x.clone() for x in xs]
            inner(xs, *rest)
            factors.extend(zip(mine, xs, strict=True))

        def theirs_of(x, *rest):
            mine, factor = factors.pop(0)
            assert (x - mine).abs().max() <= 8 * 2.0**-24 * 5  # of terms below 5, the gradients
            return factor

        monkeypatch.setattr(muon_op, "orthogonalize", ours_of)
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", theirs_of)
    shapes = ((70, 90), (90, 3)) if name == "Muon" else ((70, 90), (90,), (), (2, 3, 5, 7))
    ps = [(1 + torch.rand(s)) * torch.randn(s).sign() for s in shapes]
    qs = [p.clone().requires_grad_() for p in ps]
    ps = [p.requires_grad_() for p in ps]
    ours, theirs = getattr(optim, name)(ps, **options), getattr(torch.optim, name)(qs, **options)
    for _ in range(20):
        before = [p.detach().clone() for p in ps]
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        with torch.no_grad():
            for p, q, old in zip(ps, qs, before, strict=True):
                size = torch.maximum(p.abs(), old.abs())
                assert (p - old).abs().max() < 1 / 16
                assert ((p - q).abs() <= 2 * ulp(size, torch.float32)).all()
                p.copy_((1 + torch.rand(p.shape)) * p.sign())
                q.copy_(p)
                for key, value in theirs.state[q].items():
                    if isinstance(value, torch.Tensor):
                        mine = ours.state[p][key]
                        assert value.dtype == mine.dtype and value.shape == mine.shape
                        # 3 roundings on each side of terms no larger than these
                        scale = max(x.abs().max() for x in (value, p.grad, p.grad.square()))
                        assert (value - mine).abs().max() <= 8 * 2.0**-24 * scale
                        value.copy_(mine)


def test_lion_is_the_papers():
    """Algorithm 2 in fp64; no sum of 100 random gradients is so near 0 that its sign changes."""
    p = torch.randn(40, 50).requires_grad_()
    theta, m = p.detach().double(), torch.zeros(40, 50, dtype=torch.float64)
    optimizer = optim.Lion([p], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.5)
    for _ in range(100):
        p.grad = torch.randn(p.shape)
        g = p.grad.double()
        c = 0.9 * m + (1 - 0.9) * g
        theta = theta - 1e-3 * (c.sign() + 0.5 * theta)
        m = 0.99 * m + (1 - 0.99) * g
        optimizer.step()
    # two roundings of the weight a step, and those of lr and the decay
    assert (p.double() - theta).abs().max() <= 100 * 4 * 2.0**-24 * p.abs().max()
    assert (optimizer.state[p]["exp_avg"].double() - m).abs().max() <= 100 * 4 * 2.0**-24
    assert inspect.signature(optim.Lion).parameters["lr"].default == 1e-4
    assert inspect.signature(optim.Lion).parameters["betas"].default == (0.9, 0.99)


def test_torchs_own_optimizer_inputs_pass():
    """In a process of its own, since torch's test module changes global flags when imported."""
    script = Path(__file__).parent / "torch_inputs.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          cwd=script.parents[1], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 optimizers" in done.stdout


def run(name, params, grads, **options):
    optimizer = getattr(optim, name)(params, **options)
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", (*TORCHS, "Lion"))
def test_remainder_is_fp32_training_bit_for_bit(name):
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_dtype": "fp32"}
    shapes = [(70, 90), (33, 5)] if name == "Muon" else [(70, 90), (90,), ()]
    start = [torch.randn(s).bfloat16() for s in shapes]
    grads = [[torch.randn(s).bfloat16() for s in shapes] for _ in range(50)]
    halves = [p.clone().requires_grad_() for p in start]
    floats = [p.float().requires_grad_() for p in start]
    optimizer = run(name, halves, grads, master="remainder", **options)
    run(name, floats, grads, **options)
    for p, q in zip(halves, floats, strict=True):
        state = optimizer.state[p]
        assert state["remainder"].dtype == torch.int16
        assert same_bits(load_weight(p.detach(), state["remainder"]), q.detach())
        # half an ulp of bf16, and the tie away from zero
        assert ((p.double() - q.double()).abs() <= 0.5 * ulp(q.detach(), torch.bfloat16)).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", (*TORCHS, "Lion"))
def test_kahan_follows_fp32_where_nearest_stands_still(name, dtype):
    """200 steps, each far below half an ulp of the weights, which are in [1, 2)."""
    steps = 200
    lr = {"Adafactor": 1e-6, "Muon": 1e-4}.get(name, 1e-5)
    options = {"lr": lr, "weight_decay": 0.0, "state_dtype": "fp32"}
    start = [(1 + torch.rand(64, 64)).to(dtype)]
    grads = [[torch.rand(64, 64).to(dtype)] for _ in range(steps)]
    params = {k: [start[0].to(d).clone().requires_grad_()] for k, d in
              (("fp32", torch.float32), ("kahan", dtype), ("nearest", dtype))}
    run(name, params["fp32"], grads, **options)
    optimizer = run(name, params["kahan"], grads, master="kahan", rounding="nearest", **options)
    run(name, params["nearest"], grads, rounding="nearest", **options)
    exact = params["fp32"][0].detach()
    kept = params["kahan"][0].detach()
    moved = (exact - start[0].float()).abs().max().item()
    assert moved > 20 * lr * 0.01
    assert same_bits(params["nearest"][0].detach(), start[0])
    both = kept.float() + optimizer.state[params["kahan"][0]]["compensation"].float()
    # a step rounds the sum to fp32 (2^-24 of 2) and the compensation by 2^-9 (bf16) of its size,
    # which is below half an ulp of the weight or all that was moved
    size = min(moved, 2.0**-8)
    assert (both - exact).abs().max() <= steps * (2.0**-9 * size + 2 * 2.0**-24) + 0.01 * moved


def test_masters_in_options_and_states():
    half = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    with pytest.raises(ValueError, match=r"master='remainder' is for bfloat16 parameters"):
        optim.AdamW([half], master="remainder")
    with pytest.raises(ValueError, match="master must be None, 'remainder' or 'kahan', got 'fp32'"):
        optim.SGD([half], master="fp32")
    exact = torch.zeros(3, requires_grad=True)
    for master in ("remainder", "kahan"):
        optimizer = run("AdamW", [exact], [[torch.ones(3)]], master=master)
        assert {"remainder", "compensation"}.isdisjoint(optimizer.state[exact])


@pytest.mark.parametrize("name", (*TORCHS, "Lion"))
def test_sparse_and_complex_are_refused_clearly(name):
    p = torch.zeros(3, 4, requires_grad=True)
    p.grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
        getattr(optim, name)([p]).step()
    p = torch.zeros(3, 4, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters"):
        getattr(optim, name)([p]).step()


LR = torch.tensor(1e-3, dtype=torch.float64)
OF_A_STEP = {  # what stands between the gradients and the roundings, with moments m and v
    "adamw": lambda m, v, step: (m, v, [EMPTY], [EMPTY], [], step, LR, 0.9, 0.99, 0.0, 1e-8, False),
    "sgd": lambda m, _, step: (m, [EMPTY], step, LR, 0.9, 0.0, 0.0, False, False),
    "lion": lambda m, _, step: (m, [EMPTY], step, LR, 0.9, 0.99, 0.0, False),
    "adafactor": lambda _, v, step: ([torch.zeros(30, 1)], [torch.zeros(1, 100)], [EMPTY], step, LR,
                                     -0.8, 1e-3, 1e-3, 1.0, 0.0, False),
    "muon": lambda m, _, step: (m, [EMPTY], step, LR, 0.95, True, [3.0, -4.0, 2.0], 1e-7, 0, 0.0,
                                "original", False),
}


@pytest.mark.parametrize("op", (adamw, sgd, lion, adafactor, muon), ids=lambda op: op.name)
def test_offsets_beyond_2_to_the_31(op):
    """The draws of elements from 2^31 and 2^40 on are those of the reference, and no others'."""
    results = {}
    roundings = ("stochastic",) * (1 if op.name == "adafactor" else 2)
    for backend in ("cpu", "reference"):
        for offset in (0, 2**31 - 3, 2**40 + 5):
            p = torch.ones(30, 100, dtype=torch.bfloat16)
            g = torch.linspace(-1, 1, 3000).view(30, 100)
            state = [torch.zeros(30, 100)], [torch.zeros(30, 100)], [torch.zeros(())]
            with lowp.backend(backend):
                op([p], [g], *OF_A_STEP[op.name](*state), *roundings, 3, [5], [offset], None, None)
            results[backend, offset] = p
    for offset in (0, 2**31 - 3, 2**40 + 5):
        assert same_bits(results["cpu", offset], results["reference", offset])
    assert not same_bits(results["cpu", 0], results["cpu", 2**31 - 3])


@pytest.mark.parametrize("name", (*TORCHS, "Lion"))
def test_strides_empty_neighbours_and_no_dimensions(name):
    """A transposed parameter has the bits of a contiguous one; empty and 0-dim ones skip nobody."""
    found = []
    start, grads = torch.randn(64, 129).bfloat16(), torch.randn(3, 64, 129).bfloat16()
    for crowded in (False, True):
        p = (start.t().contiguous().t() if crowded else start.clone()).requires_grad_()
        named = {"matrix": p}
        if crowded:
            named = {"first": torch.zeros(0, 7), **named, "last": torch.zeros(7, 0)}
            if name != "Muon":  # is for matrices
                named["scalar"] = torch.ones(())
        assert p.is_contiguous() != crowded
        optimizer = getattr(optim, name)(list(named.items()))
        for grad in grads:
            for other in named.values():
                other.grad = torch.ones_like(other)
            p.grad = grad
            optimizer.step()
        found.append(p.detach())
        assert {s["step"].item() for s in optimizer.state.values()} == {3.0}
        assert len(optimizer.state) == len(named) and named.get("scalar", torch.zeros(())) < 1
    assert same_bits(*found) and not same_bits(found[0], start)
