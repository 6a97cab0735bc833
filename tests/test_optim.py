"""lowp.optim: torch's signatures, schedulers, scalers and state dicts; and what rounding is for."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import lowp
from lowp.key import clock, tensor_id
from tests.tensors import FLOATS, same_bits

STATE_DTYPES = (None, "fp32", "bf16", "int8")
OPTIMIZERS = {
    "AdamW": (lowp.optim.AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adam": (lowp.optim.Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (lowp.optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "Lion": (lowp.optim.Lion, None, {"lr": 1e-3, "weight_decay": 0.1}),
    "Adafactor": (lowp.optim.Adafactor, None, {"lr": 1e-2, "weight_decay": 0.1}),
}
TORCHS = ("AdamW", "Adam", "SGD")


def params_of(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((70, 90), (90,), ())
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


TRAJECTORIES = [
    *[(name, o) for name in ("AdamW", "Adam") for o in (
        {}, {"maximize": True}, {"weight_decay": 0.0}, {"amsgrad": True})],
    *[("SGD", o) for o in ({}, {"maximize": True}, {"weight_decay": 0.0}, {"nesterov": True},
                           {"dampening": 0.5}, {"momentum": 0.0})],
]


@pytest.mark.parametrize(("name", "options"), TRAJECTORIES)
def test_fp32_trajectory_is_torchs(name, options):
    ours, theirs, base = OPTIMIZERS[name]
    options = {**base, **options}
    ps, qs = params_of(), params_of()
    a, b = ours(ps, **options), theirs(qs, **options)
    for step in range(50):
        set_grads(ps, step)
        set_grads(qs, step)
        a.step()
        b.step()
    for p, q in zip(ps, qs, strict=True):
        # each step rounds the weight once (2^-24) and an update below 0.05 about ten times
        assert (p - q).abs().max() <= 50 * 2.0**-24 * (q.abs().max() + 10 * 0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_options(name):
    ours, _, _ = OPTIMIZERS[name]
    p = [torch.zeros(3, requires_grad=True)]
    for message, options in (
        ("earning rate.*: -1", {"lr": -1}),
        ("master must be None", {"master": "fp32"}),
        ("rounding must be 'nearest' or 'stochastic', got 'up'", {"rounding": "up"}),
        ("state_rounding must be", {"state_rounding": "up"}),
        ("state_dtype must be None .*got 'int4'", {"state_dtype": "int4"}),
        ("Tensor lr must be 1-element", {"lr": torch.ones(2)}),
    ):
        with pytest.raises(ValueError, match=message):
            ours(p, **options)
    if name != "Adafactor":  # torch's has neither
        with pytest.raises(RuntimeError, match="cannot be `True` together"):
            ours(p, foreach=True, fused=True)
        with pytest.raises(ValueError, match="differentiable=True is not supported"):
            ours(p, differentiable=True)
    bad = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    bad.grad = torch.ones_like(bad)
    with pytest.raises(TypeError, match=r"parameters must be float32, .* got torch\.float64"):
        ours([bad]).step()
    sparse = nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ours(sparse.parameters()).step()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_repeats_the_bits(name, dtype, state_dtype):
    """Ten steps, a round trip through a file, ten more: equal to twenty."""
    ours, _, options = OPTIMIZERS[name]

    def make(seed=0):
        params = params_of(dtype, seed)
        return params, ours(params, **options, state_dtype=state_dtype, seed=7)

    def run(params, optimizer, steps):
        for step in steps:
            set_grads(params, step)
            optimizer.step()

    straight, a = make()
    run(straight, a, range(20))
    first, b = make()
    run(first, b, range(10))
    buffer = io.BytesIO()
    torch.save({"params": first, "optimizer": b.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second, c = make(seed=1)
    with torch.no_grad():
        for p, kept in zip(second, saved["params"], strict=True):
            p.copy_(kept)
    clock.set(1)
    c.load_state_dict(saved["optimizer"])
    assert clock.step.item() == 11
    for p, q in zip(second, first, strict=True):
        for key, value in b.state[q].items():
            if isinstance(value, torch.Tensor):
                assert same_bits(c.state[p][key], value), key
                assert c.state[p][key].data_ptr() != value.data_ptr()
            else:
                assert c.state[p][key] == value
    run(second, c, range(10, 20))
    assert all(map(same_bits, second, straight))


def test_state_types_and_bytes():
    p = torch.zeros(64, 1024, dtype=torch.bfloat16, requires_grad=True)
    small = torch.zeros(10, dtype=torch.bfloat16, requires_grad=True)
    set_grads([p, small], 0)
    optimizer = lowp.optim.AdamW([p, small], state_dtype="int8")
    optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == torch.int8 and state["exp_avg_sq"].dtype == torch.uint8
    moments = sum(t.nbytes for k, t in state.items() if k.startswith("exp"))
    assert moments / p.numel() == 2 + 2 * 4 / 256
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    kept = lowp.optim.AdamW([p])
    kept.step()
    assert kept.state[p]["exp_avg"].dtype == torch.bfloat16
    assert lowp.optim.AdamW([p], state_dtype=torch.int8).defaults["state_dtype"] == "int8"


def test_ids_come_from_names_or_positions_and_the_kept_one_wins():
    model = nn.Linear(3, 2)
    set_grads(model.parameters(), 0)
    named = lowp.optim.AdamW(model.named_parameters())
    named.step()
    assert named.state[model.weight]["tensor"] == tensor_id("weight")
    plain = lowp.optim.AdamW([model.weight])
    plain.add_param_group({"params": [model.bias], "lr": 0.5})
    plain.step()
    assert [plain.state[p]["tensor"] for p in model.parameters()] == [0, 1]
    other = lowp.optim.AdamW(model.parameters())
    other.load_state_dict(lowp.optim.AdamW(model.named_parameters()).state_dict())
    kept = copy.deepcopy(named.state_dict())
    swapped = lowp.optim.AdamW(model.parameters())
    swapped.load_state_dict(kept)
    assert swapped.state[model.weight]["tensor"] == tensor_id("weight")


@pytest.mark.parametrize("name", TORCHS)
def test_schedulers_with_float_and_tensor_lr(name):
    ours, theirs, _ = OPTIMIZERS[name]
    schedules = (
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
    )
    for schedule in schedules:
        for lr in (0.01, torch.tensor(0.01)):
            ps, qs = params_of(), params_of()
            a = ours(ps, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
            b = theirs(qs, lr=float(lr))
            sa, sb = schedule(a), schedule(b)
            for step in range(20):
                set_grads(ps, step)
                set_grads(qs, step)
                for o, s in ((a, sa), (b, sb)):
                    o.step()
                    s.step(1.0) if "Plateau" in type(s).__name__ else s.step()
            ours_lr, torch_lr = a.param_groups[0]["lr"], b.param_groups[0]["lr"]
            assert math.isclose(float(ours_lr), torch_lr, rel_tol=1e-6)
            for p, q in zip(ps, qs, strict=True):
                assert (p - q).abs().max() < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_scaler(name):
    ours, _, options = OPTIMIZERS[name]
    for dtype in FLOATS:
        for mode in ("plain", "unscale and clip", "inf"):
            if dtype == torch.float16 and mode == "unscale and clip":
                params = params_of(dtype)
                optimizer, scaler = ours(params, **options), torch.amp.GradScaler("cpu")
                scaler.scale(sum(p.sum() for p in params)).backward()
                with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
                    scaler.unscale_(optimizer)
                continue
            params, other = params_of(dtype), params_of(dtype)
            optimizer, plain = ours(params, **options), ours(other, **options)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            weights = [torch.randn(p.shape) for p in params]
            clock.set(1)
            for step in range(3):
                for group in (params, other):
                    for p in group:
                        p.grad = None
                loss = sum((p.float() * w).sum() for p, w in zip(params, weights, strict=True))
                (loss * math.inf if mode == "inf" and step == 1 else scaler.scale(loss)).backward()
                scaler.get_scale()
                sum((p.float() * w).sum() for p, w in zip(other, weights, strict=True)).backward()
                if mode == "inf" and step == 1:
                    scaler.scale(torch.ones(()))
                    before = (copy.deepcopy(optimizer.state_dict()), [p.clone() for p in params],
                              clock.step.item())
                    scaler.step(optimizer)
                    assert all(map(same_bits, params, before[1]))
                    assert clock.step.item() == before[2]
                    for kept, now in zip(before[0]["state"].values(), optimizer.state.values(),
                                         strict=True):
                        assert all(torch.equal(kept[k], now[k]) for k in kept if k != "tensor")
                    scaler.update(256.0)
                    continue
                if mode == "unscale and clip":
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(params, 0.5)
                    nn.utils.clip_grad_norm_(other, 0.5)
                scaler.step(optimizer)
                scaler.update(256.0)
                plain.step()
            for p, q in zip(params, other, strict=True):
                if dtype == torch.float16:  # the scaled fp16 gradient is rounded at another place
                    assert (p - q).abs().max() < 0.02
                else:
                    assert same_bits(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure_hooks_copies(name):
    ours, _, options = OPTIMIZERS[name]
    params = params_of(torch.bfloat16)
    optimizer = ours(params, **options)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.float().square().sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and seen == [1]
    assert torch.is_grad_enabled()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin = [p for g in other.param_groups for p in g["params"]]
        set_grads(twin, 1)
        set_grads(params, 1)
        other.step()
        kept = [p.detach().clone() for p in params]
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        assert all(map(same_bits, [t.detach() for t in twin], [p.detach() for p in params]))
        with torch.no_grad():
            for p, k in zip(params, kept, strict=True):
                p.copy_(k)
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(("kind", "compiled"), [
    ("torch", False), ("GaLore", False),
    *itertools.product((*OPTIMIZERS, "Muon"), (False, True)),
])
def test_a_backward_pass_after_the_step_is_torchs_error(kind, compiled):
    """A graph that saved the old weight must not give gradients of the new one. torch's default
    step moves the version by which autograd knows; its fused one does not."""
    p = torch.randn(8, 8).requires_grad_()
    x = torch.randn(8, 8).requires_grad_()
    if kind == "torch":
        optimizer = torch.optim.AdamW([p])
    elif kind == "GaLore":
        optimizer = lowp.optim.GaLore([p], lowp.optim.SGD, rank=2)
    else:
        optimizer = getattr(lowp.optim, kind)([p])
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for _ in range(2):
        loss = (x @ p).sum()
        p.grad = torch.ones_like(p)
        step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_step_of_tensors_of_inference_mode():
    """Which have no versions."""
    with torch.inference_mode():
        p, other = (torch.ones(3, dtype=torch.bfloat16) for _ in range(2))
        p.grad = torch.ones_like(p)
        lowp.optim.SGD([p], lr=0.5).step()
    assert p.is_inference() and (p == 0.5).all() and (other == 1).all()


def test_torch_generator_is_never_touched():
    params = params_of(torch.bfloat16)
    optimizer = lowp.optim.AdamW(params)
    before = torch.get_rng_state()
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    layer = lowp.Linear(8, 8, precision="int8_full")
    torch.set_rng_state(before)
    layer(torch.ones(2, 8)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_zero_gradient_without_decay_changes_no_bit(dtype):
    params = params_of(dtype)
    want = [p.detach().clone() for p in params]
    optimizer = lowp.optim.AdamW(params, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(20):
        optimizer.step()
    assert all(map(same_bits, [p.detach() for p in params], want))


def test_decay_only_run_follows_fp32_in_the_mean():
    """lr * weight_decay = 1e-6, 20,000 steps: stochastic rounding decays, nearest stands still."""
    steps, lanes = 20_000, 4096
    runs = {}
    for rounding in ("stochastic", "nearest"):
        p = torch.ones(lanes, dtype=torch.bfloat16, requires_grad=True)
        p.grad = torch.zeros_like(p)
        optimizer = lowp.optim.AdamW([p], lr=1e-3, weight_decay=1e-3, rounding=rounding)
        for _ in range(steps):
            optimizer.step()
        runs[rounding] = p.detach().double()
    assert (runs["nearest"] == 1.0).all()
    exact = torch.ones((), dtype=torch.float32)
    for _ in range(steps):
        exact = exact * torch.tensor(1 - 1e-6, dtype=torch.float32)
    # Each step moves a lane down by one ulp u = 2^-8 with probability x 1e-6 / u: variance
    # u x 1e-6. Its 16-bit draw cuts x 1e-6 / u = 2.6e-4 to a multiple of 2^-16 below it: up to 6 %
    # of the decay.
    sigma = math.sqrt(steps * 1e-6 * 2.0**-8 / lanes)
    decay = 1.0 - exact.item()
    cut = steps * 2.0**-16 * 2.0**-8
    mean = runs["stochastic"].mean().item()
    assert exact.item() - 3 * sigma <= mean <= exact.item() + 3 * sigma + cut
    assert 1.0 - mean > 0.9 * decay
