"""The gradient side of the optimizers: norms, clipping, accumulation, release, zero_grad."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowp
from lowp.key import clock
from lowp.ops.accumulate import accumulate
from lowp.ops.square_sums import square_sums
from lowp.optim import SGD, Adam, AdamW, GradientAccumulation, GradientRelease, Lion
from lowp.optim.norm import total_on_device
from tests.tensors import FLOATS, random_bits, same_bits, special_values, strided_forms

ALL = (AdamW, Adam, SGD, Lion)


def net(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(dtype)


def backward(model: nn.Module, seed: int, factor: float = 1.0) -> None:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed))
    (model(x.to(next(model.parameters()).dtype)).float().square().mean() * factor).backward()


@pytest.mark.parametrize("dtype", FLOATS)
def test_square_sums_equal_reference_and_exact(isa, threads, dtype):
    xs = [torch.randn(70, 333).to(dtype), torch.randn(()).to(dtype), torch.empty(0, 3).to(dtype),
          torch.randn(1024).to(dtype), torch.randn(3001).to(dtype) * 1e-20]
    xs += [x for _, x in strided_forms(torch.randn(64, 129).to(dtype))]
    sums = square_sums(xs)
    with lowp.backend("reference"):
        assert same_bits(sums, square_sums(xs))
    for x, got in zip(xs, sums.tolist(), strict=True):
        exact = math.fsum(v * v for v in x.double().flatten().tolist())
        # squares are exact; (runs + 64 elements a lane + 4 halvings) additions of positive terms
        assert abs(got - exact) <= (x.numel() / 1024 + 68) * 2.0**-53 * exact
    special = square_sums([torch.tensor([1.0, math.inf]), torch.tensor([math.inf, math.nan])])
    assert special[0] == math.inf and special[1].isnan()
    assert square_sums([torch.full((4,), 3e38)])[0] == 4 * float(torch.tensor(3e38)) ** 2
    assert square_sums([]).shape == (0,)
    torch.library.opcheck(torch.ops.lowp.square_sums.default, (xs[:2],))
    with pytest.raises(TypeError, match=r"lowp::square_sums: xs\[0\] must be float32"):
        square_sums([torch.ones(2).double()])


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_clip_is_that_of_clip_grad_norm(optimizer, dtype):
    """In fp32 as after torch's clip_grad_norm_, which rounds every gradient once more; gradients
    are not written; small ones pass unchanged, bit for bit."""
    for factor, clips in ((50.0, True), (1e-4, False)):
        ours, theirs = net(dtype), net(dtype)
        a = optimizer(ours.parameters(), lr=1e-2, clip_grad_norm=1.0)
        b = optimizer(theirs.parameters(), lr=1e-2)
        for step in range(3):
            for model in (ours, theirs):
                model.zero_grad()
                backward(model, step, factor)
            before = [p.grad.clone() for p in ours.parameters()]
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            assert (norm > 1.0) == clips
            a.step()
            b.step()
            assert all(map(same_bits, before, [p.grad for p in ours.parameters()]))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if not clips:
                assert same_bits(p.detach(), q.detach())
            elif dtype == torch.float32:
                # 4 roundings of the factor and the gradient a step, each 2^-24 of an update below
                # 2 lr (Lion's is the same unless a sum near 0 changes its sign)
                assert (p - q).abs().max() <= 3 * (8 * 2.0**-24 * 2e-2 + 2.0**-24 * p.abs().max())
    with pytest.raises(ValueError, match="clip_grad_norm must be None or above 0, got -1"):
        optimizer(net().parameters(), clip_grad_norm=-1)


def test_clip_after_a_scaler_and_with_non_finite_gradients():
    """The norm is of the unscaled gradients; a NaN makes every weight NaN, as in torch."""
    plain, scaled = net(), net()
    a = AdamW(plain.parameters(), clip_grad_norm=0.01)
    b = AdamW(scaled.parameters(), clip_grad_norm=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        for model, factor in ((plain, 1.0), (scaled, 2.0**10)):
            model.zero_grad()
            backward(model, step, factor)
        a.step()
        scaler.scale(torch.ones(()))
        scaler.step(b)
        scaler.update(2.0**10)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
    before = [p.detach().clone() for p in scaled.parameters()]
    backward(scaled, 0, math.inf)
    scaler.step(b)
    assert all(map(same_bits, before, [p.detach() for p in scaled.parameters()]))
    scaled.zero_grad()
    backward(scaled, 0)
    scaled[0].bias.grad[0] = math.nan
    b.step()
    assert all(p.isnan().all() for p in scaled.parameters())


@pytest.mark.parametrize("size", (1, 2, 3, 5, 300, 4097))
def test_totals_on_the_device(size):
    """Inside half an ulp and what is dropped; no order changes a bit; Inf and NaN stay."""
    for spread in (0, 1, 10, 40, 300):
        exponents = torch.randint(-spread, spread // 2 + 1, (size,)).double()
        x = torch.rand(size, dtype=torch.float64) * torch.exp2(exponents)
        exact, total = sum(map(Fraction, x.tolist())), total_on_device(x)
        dropped = Fraction(size**3 * x.max().item()) / 2**101
        assert abs(Fraction(total.item()) - exact) <= Fraction(math.ulp(float(exact))) / 2 + dropped
        for _ in range(5):
            assert same_bits(total, total_on_device(x[torch.randperm(size)]))
        for value in (math.inf, math.nan):
            x[size // 2] = value
            assert total_on_device(x).isnan() if math.isnan(value) else total_on_device(x) == value
    assert total_on_device(torch.zeros(size, dtype=torch.float64)) == 0
    least = torch.full((size,), 2.0**-298, dtype=torch.float64)  # of squares of fp32
    assert total_on_device(least) == size * 2.0**-298


class OnDevice(TorchDispatchMode):
    """Refuses everything that brings a value of a GPU to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [[x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
                   for values in ((args, kwargs), found)]
        here, there = (any(x.is_cuda for x in xs) for xs in tensors)
        assert there or not here or not tensors[1], f"{function} reads from the GPU"
        return found


@pytest.mark.parametrize("scaled", (False, True))
def test_clipping_on_a_gpu_waits_for_nothing(scaled):
    """No GPU is needed to see it: torch refuses to read a fake tensor, here also to copy it."""
    with FakeTensorMode(), OnDevice():
        p, *grads = [torch.randn(3, 4, device="cuda") for _ in range(4)]
        optimizer = AdamW([p.requires_grad_()], clip_grad_norm=1.0)
        scale = torch.ones((), device="cuda") if scaled else None
        clipped, found_inf = optimizer.scaler(grads, scale, None)
    assert clipped.is_cuda and clipped.dtype == torch.float32 and found_inf is None


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_accumulate_equals_reference(isa, dtype, rounding):
    special = special_values()
    shapes = [torch.randn(57, 401), torch.randn(()), torch.empty(0, 3),
              special.repeat(len(special)), random_bits(3000, seed=3)]
    for grad_type in FLOATS:
        grads = [torch.randn(p.shape).to(grad_type) for p in shapes[:3]]
        grads += [special.repeat_interleave(len(special)).to(grad_type),
                  random_bits(3000, seed=2).to(grad_type)]
        results = []
        for backend in ("cpu", "reference"):
            totals = [p.to(dtype) for p in shapes]
            with lowp.backend(backend):
                accumulate(totals, grads, rounding, 7, torch.tensor(3), 2, [*range(5)],
                           [0, 13, 0, 5, 2**40])
            results.append(totals)
        assert all(map(same_bits, *results))


def test_accumulate_in_other_ways(threads):
    for form, total in strided_forms(torch.randn(64, 129).bfloat16()):
        arguments = ([torch.randn(total.shape)], "stochastic", 7, torch.tensor(3), 1, [0], [0])
        if form == "expanded":
            with pytest.raises(ValueError, match=r"accumulate: params\[0\] is expanded"):
                accumulate([total], *arguments)
            continue
        plain = total.contiguous().clone()
        accumulate([total], *arguments)
        accumulate([plain], *arguments)
        assert same_bits(total.contiguous(), plain)
    whole, parts = torch.randn(64).bfloat16(), []
    grad = torch.randn(64)
    for rows, offset in ((slice(0, 23), 0), (slice(23, 64), 23)):
        parts.append(whole[rows].clone())
        accumulate([parts[-1]], [grad[rows]], "stochastic", 7, torch.tensor(3), 1, [0], [offset])
    accumulate([whole], [grad], "stochastic", 7, torch.tensor(3), 1, [0], [0])
    assert same_bits(whole, torch.cat(parts))
    torch.library.opcheck(torch.ops.lowp.accumulate.default,
                          ([whole], [grad], "stochastic", 7, torch.tensor(3), 1, [0], [0]))
    with pytest.raises(ValueError, match=r"lowp::accumulate: grads\[0\] must have shape \(64,\)"):
        accumulate([whole], [grad[1:]], "stochastic", 7, torch.tensor(3), 1, [0], [0])


def test_accumulation_keeps_small_gradients_in_the_mean():
    """1 + 256 times 2^-10, which is a quarter of bf16's spacing at 1: nearest stays at 1."""
    lanes, times, small = 4096, 256, 2.0**-10
    totals = {}
    for kind in ("stochastic", "nearest", "autograd"):
        p = torch.zeros(lanes, dtype=torch.bfloat16, requires_grad=True)
        if kind != "autograd":
            accumulation = GradientAccumulation([p], rounding=kind)
        for value in (1.0, *[small] * times):
            (p * value).sum().backward()
        totals[kind] = p.grad.double()
        if kind != "autograd":
            accumulation.remove()
            (p * 1.0).sum().backward()
            assert p.grad.double().mean() >= 1.99
    assert (totals["nearest"] == 1.0).all() and (totals["autograd"] == 1.0).all()
    # an addition moves by u = 2^-7 with probability small / u: variance u small
    sigma = math.sqrt(times * small * 2.0**-7 / lanes)
    assert abs(totals["stochastic"].mean().item() - (1 + times * small)) < 5 * sigma


def test_accumulation_is_reproducible_and_leaves_the_rest_to_autograd():
    def run(step: int) -> list[torch.Tensor]:
        clock.set(step)
        model = net(torch.bfloat16)
        embedding = nn.Embedding(9, 20, sparse=True, dtype=torch.bfloat16)
        GradientAccumulation([*model.named_parameters(), ("embedding", embedding.weight)])
        seen, generator = [], torch.get_rng_state()
        for _ in range(2):
            model.zero_grad()
            for seed in range(4):
                backward(model, seed)
            seen += [p.grad for p in model.parameters()]
            clock.advance()
        embedding(torch.tensor([2])).sum().backward()
        assert embedding.weight.grad.is_sparse
        assert torch.equal(torch.get_rng_state(), generator)
        return seen

    a, b, c = run(1), run(1), run(2)
    assert all(map(same_bits, a, b))
    assert all(map(same_bits, a[4:], c[:4])), "the second step's draws are those of step 2"
    assert not all(map(same_bits, a[:4], a[4:]))
    plain = net()
    GradientAccumulation(plain.parameters())
    twin = net()
    for seed in range(3):
        backward(plain, seed)
        backward(twin, seed)
    assert all(same_bits(p.grad, q.grad)
               for p, q in zip(plain.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="rounding must be one of nearest, stochastic, got 'up'"):
        GradientAccumulation([], rounding="up")


@pytest.mark.parametrize("optimizer", ALL)
def test_release_has_the_bits_of_a_step_and_keeps_no_gradient(optimizer):
    released, plain = net(torch.bfloat16), net(torch.bfloat16)
    a = optimizer(released.named_parameters(), lr=1e-2, master="kahan")
    b = optimizer(plain.named_parameters(), lr=1e-2, master="kahan")
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (a, b)]
    release = GradientRelease(a)
    most = 0

    def count(p: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(q.grad is not None for q in released.parameters()))

    for p in released.parameters():
        p.register_post_accumulate_grad_hook(count)
    for step in range(4):
        clock.set(step + 1)
        backward(released, step)
        assert all(p.grad is None for p in released.parameters())
        a.step()
        assert clock.step.item() == step + 2
        clock.set(step + 1)
        plain.zero_grad()
        backward(plain, step)
        b.step()
        for schedule in schedules:
            schedule.step()
    assert most == 0
    for p, q in zip(released.parameters(), plain.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in b.state[q].items():
            other = a.state[p][key]
            assert same_bits(other, value) if isinstance(value, torch.Tensor) else other == value
    release.remove()
    backward(released, 9)
    assert all(p.grad is not None for p in released.parameters())


def test_release_errors():
    model = net()
    with pytest.raises(ValueError, match="clip_grad_norm needs all gradients at once"):
        GradientRelease(AdamW(model.parameters(), clip_grad_norm=1.0))
    with pytest.raises(TypeError, match=r"must be one of lowp.optim, got SGD"):
        GradientRelease(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="p is none of its parameters"):
        AdamW(model.parameters()).step_parameter(torch.zeros(1))


@pytest.mark.parametrize("optimizer", ALL)
def test_zero_grad(optimizer):
    model = net()
    o = optimizer(model.parameters(), lr=1e-2)
    backward(model, 0)
    o.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    o.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    o.step()
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
