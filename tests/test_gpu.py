"""What only a GPU can show, of both kernel families: streams, CUDA graphs, its NaN.

Together with tests/test_far_offsets.py and the cases of tests/test_device_kernels.py on a GPU::

    pytest -m gpu
"""

from __future__ import annotations

import math

import pytest
import torch

import lowp
from lowp.key import clock
from lowp.ops.accumulate import accumulate
from lowp.ops.activation_grad import activation_grad
from lowp.ops.adafactor import adafactor
from lowp.ops.adamw import adamw
from lowp.ops.bias_grad import bias_grad
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.muon import muon
from lowp.ops.quantize import quantize
from lowp.ops.scaled_mm import scaled_mm
from lowp.ops.sgd import sgd
from lowp.ops.square_sums import square_sums
from lowp.reference.activation import gradient
from lowp.reference.rounding import round_to
from tests import cases, update_cases
from tests import test_captured_steps as training
from tests.targets import REFERENCE, Target, moved
from tests.tensors import FLOATS, same_bits
from tests.test_matrix_optim_ops import adafactor_case, exact_muon_case
from tests.updates import cloned

pytestmark = pytest.mark.gpu


def quantize_on(x: torch.Tensor, granularity: str, step: torch.Tensor):
    return quantize(x, granularity, 64, "stochastic", 1, step, 2, 4, 0)


@pytest.mark.parametrize("shape", ((1024, 4096, 512), (300, 520, 4096), (4096, 4096, 256),
                                   (16, 4096, 4096)))
def test_tiles_of_every_size(gpu_target: Target, shape):
    """Shapes that take each of the tiles; integers, so that every sum is exact in any order."""
    m, n, k = shape
    a, b = cases.codes(m, k), cases.codes(n, k)
    for out in FLOATS:
        cases.assert_bits(gpu_target, scaled_mm, a, b, torch.rand(m), torch.rand(n), torch.randn(n),
                          "gelu", out, True)
    for dtype in (torch.bfloat16, torch.float16):
        x, w = (a % 4).to(dtype), (b % 4).to(dtype)
        want = (x.cuda().double() @ w.cuda().double().t()).float().cpu()
        for left, right in ((x, w), (x, w.t().contiguous().t()),
                            (x.t().contiguous().t(), w.t().contiguous().t())):
            y = gpu_target.run(linear, left, right, None, "none", torch.float32, False)[0]
            assert torch.equal(y, want)
        preact = (torch.randn(m, n) * 30).to(dtype)  # to where the logistic function is subnormal
        for activation in ("gelu", "silu"):
            dz = gradient(want, preact.float(), activation)
            got = gpu_target.run(linear_dgrad, x, w.t().contiguous(), preact, activation, dtype)
            assert same_bits(got, round_to(dz, dtype, "nearest"))
        dy = (cases.codes(m, n) % 4).to(dtype)
        dw, db = gpu_target.run(linear_wgrad, dy, x, True, torch.float32)
        assert torch.equal(dw, (dy.cuda().double().t() @ x.cuda().double()).float().cpu())
        assert torch.equal(db, dy.float().sum(0))
        dy = torch.randn(m, n).to(dtype)
        cases.assert_bias_grad_of_wgrad(
            gpu_target, dy, gpu_target.run(linear_wgrad, dy, x, True, torch.float32)[1])


@pytest.mark.parametrize("granularity", ("tensor", "row", "column", "block"))
def test_a_side_stream_behind_a_busy_kernel(gpu_target: Target, granularity):
    """A launch on another stream than torch's current one would read x before it is written."""
    x = torch.randn(512, 512)
    want = REFERENCE.run(quantize_on, x, granularity, torch.tensor(3))
    source, late = x.cuda(), torch.zeros(512, 512, device="cuda")
    step, side = torch.tensor(3).cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with lowp.backend(gpu_target.backend), torch.cuda.stream(side):
        quantize_on(late, granularity, step)  # compiled before the wait
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        got = quantize_on(late, granularity, step)
    side.synchronize()
    assert all(map(same_bits, moved(got, "cpu"), want))


def test_codes_of_a_replayed_graph_are_drawn_afresh(gpu_target: Target):
    x, step = torch.randn(64, 256), torch.ones((), dtype=torch.int64, device="cuda")
    static = x.cuda()
    with lowp.backend(gpu_target.backend):
        quantize_on(static, "row", step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.add_(1)
            codes, _ = quantize_on(static, "row", step)
    seen = []
    for replay in range(3):
        graph.replay()
        seen.append(codes.cpu())
        want = REFERENCE.run(quantize_on, x, "row", torch.tensor(replay + 2))
        assert same_bits(seen[-1], want[0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(("together", "clip"), ((True, None), (True, 0.1), (False, None)),
                         ids=("whole step", "whole step, clipped", "passes alone"))
def test_layers_of_a_replayed_graph_are_the_eager_ones(gpu_target: Target, together, clip):
    """Layers that draw in every product, with the update inside of the graph or behind it."""
    x, here = training.X.cuda(), torch.cuda.current_stream()

    def step(module, optimizer):
        training.passes(module, x)
        optimizer.step()

    def start():
        clock.set(1)
        module = training.model().cuda()
        return module, training.optimizer_of(module, clip_grad_norm=clip)

    with lowp.backend(gpu_target.backend):
        module, optimizer = start()
        expected = []
        for _ in range(4):
            step(module, optimizer)
            expected.append([p.detach().cpu() for p in module.parameters()])
        module, optimizer = start()
        side = torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):  # torch asks for the warm-up to run beside
            step(module, optimizer)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            training.passes(module, x)
            if together:
                optimizer.step()
        for now in (2, 3, 4):
            graph.replay()
            if not together:
                optimizer.step()
            found = [p.detach().cpu() for p in module.parameters()]
            assert all(map(same_bits, found, expected[now - 1]))
            assert clock.step == now + 1


UPDATES = {
    **update_cases.OPS,
    "muon": (muon, lambda params, grads, kind, **options: exact_muon_case(
        [p.shape for p in params], params[0].dtype, kind, **options)),
    "adafactor": (adafactor, lambda params, grads, kind, **options: adafactor_case(
        params, grads, **options)),
}


@pytest.mark.parametrize("kind", (torch.bfloat16, "int8"))
@pytest.mark.parametrize("name", UPDATES)
def test_updates_of_a_replayed_graph_are_the_eager_ones(gpu_target: Target, name, kind):
    """Three replays with a changing rate: steps, noise and lr are read on the device."""
    op, make = UPDATES[name]
    shapes = ((40, 256), (20, 15) if name == "muon" else (300,))
    params = [torch.randn(shape).bfloat16() for shape in shapes]
    case = make(params, [torch.randn(p.shape) for p in params], kind,
                found_inf=torch.tensor(0.0), grad_scale=torch.tensor(2.0))
    device = dict(zip(case, moved(list(cloned(case).values()), "cuda"), strict=True))
    rates = (3e-2, 1e-2, 2e-3)
    with lowp.backend(gpu_target.backend):
        op(*cloned(device).values())  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            op(*device.values())
    for rate in rates:
        device["lr"].fill_(rate)
        graph.replay()
        lr = torch.tensor(rate, dtype=torch.float64)
        case = update_cases.run(REFERENCE, op, {**case, "lr": lr})
    for key, want in case.items():
        if isinstance(want, list) and want and isinstance(want[0], torch.Tensor):
            assert all(map(same_bits, moved(device[key], "cpu"), want)), key


def test_a_replayed_graph_accumulates_with_fresh_draws(gpu_target: Target):
    total, grad = torch.randn(300).bfloat16(), torch.randn(300)
    step = torch.ones((), dtype=torch.int64, device="cuda")
    case = update_cases.accumulate_case([total], [grad], "stochastic", step=step)
    device = dict(zip(case, moved(list(case.values()), "cuda"), strict=True))
    with lowp.backend(gpu_target.backend):
        accumulate(*cloned(device).values())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            accumulate(*device.values())
    for now in (4, 5):
        device["step"].fill_(now)
        graph.replay()
        case = update_cases.run(REFERENCE, accumulate, {**case, "step": torch.tensor(now)})
        assert same_bits(device["totals"][0].cpu(), case["totals"][0])


def test_a_step_on_the_host_reaches_the_device(gpu_target: Target):
    case = update_cases.accumulate_case([torch.randn(300).bfloat16()], [torch.randn(300)],
                                        "stochastic")
    device = dict(zip(case, moved(list(case.values()), "cuda"), strict=True))
    with lowp.backend(gpu_target.backend):
        accumulate(*{**device, "step": case["step"]}.values())
    want = update_cases.run(REFERENCE, accumulate, case)
    assert same_bits(device["totals"][0].cpu(), want["totals"][0])


def test_square_sums_stay_on_the_device(gpu_target: Target):
    xs = [torch.randn(300), torch.randn(70, 400).bfloat16()]
    with lowp.backend(gpu_target.backend):
        sums = square_sums(moved(xs, "cuda"))
    assert sums.is_cuda and same_bits(sums.cpu(), square_sums(xs))


def test_found_inf_in_a_graph_skips_that_replay_alone(gpu_target: Target):
    params, grads = [torch.randn(300).bfloat16()], [torch.randn(300)]
    case = update_cases.sgd_case(params, grads, torch.bfloat16, found_inf=torch.tensor(0.0))
    device = dict(zip(case, moved(list(case.values()), "cuda"), strict=True))
    with lowp.backend(gpu_target.backend):
        sgd(*cloned(device).values())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sgd(*device.values())
    for found in (1.0, 0.0):
        before, step = device["params"][0].clone(), device["steps"][0].item()
        device["found_inf"].fill_(found)
        graph.replay()
        assert same_bits(device["params"][0].cpu(), before.cpu()) == (found == 1.0)
        assert device["steps"][0].item() == step + 1 - found


def test_the_gpu_s_own_nan(gpu_target: Target):
    """0/0 on an NVIDIA GPU is 0x7FFFFFFF, which the usual stochastic rounding turns into -0."""
    zero = torch.zeros(64, 256, device="cuda")
    nan = zero / zero
    with lowp.backend(gpu_target.backend):
        for dtype in FLOATS:
            x = nan.to(dtype)
            codes, scale = quantize_on(x, "row", torch.tensor(3))
            assert not codes.any() and scale.isnan().all()
            assert bias_grad(x).isnan().all()
            assert activation_grad(x, torch.ones_like(x), "gelu").isnan().all()
            case = update_cases.adamw_case([x.cpu()], [torch.zeros(x.shape)], dtype)
            device = dict(zip(case, moved(list(case.values()), "cuda"), strict=True))
            device["params"][0].copy_(x)
            adamw(*device.values())
            assert device["params"][0].isnan().all()
            case = update_cases.adamw_case([torch.zeros(x.shape).to(dtype)], [nan.cpu()], dtype)
            after = update_cases.run(gpu_target, adamw, case)
            want = update_cases.run(REFERENCE, adamw, case)
            assert same_bits(after["params"][0], want["params"][0])
            for bits in (0x7FFFFFFF, -1):
                p = torch.full((64,), bits, dtype=torch.int32).view(torch.float32)
                case = update_cases.sgd_case([torch.zeros(64).to(dtype)], [p], torch.float32)
                after = update_cases.run(gpu_target, sgd, case)
                want = update_cases.run(REFERENCE, sgd, case)
                assert same_bits(after["params"][0], want["params"][0])
                assert math.isnan(after["params"][0][0].item())


def test_another_device_than_the_current_one(gpu_target: Target):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(64, 64, device="cuda:1")
    arguments = ("row", 0, "nearest", 0, None, 0, 4, 0)
    with lowp.backend(gpu_target.backend):
        got = quantize(x, *arguments)
    assert torch.cuda.current_device() == 0
    assert all(map(same_bits, moved(got, "cpu"), REFERENCE.run(quantize, x.cpu(), *arguments)))
