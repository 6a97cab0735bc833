"""On a GPU: every op of every backend that runs there, over the case lists of the CPU kernels, bit
for bit.

    pytest -m gpu
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lowp
from lowp.backend import status
from lowp.ops import product
from lowp.ops.adamw import adamw
from lowp.ops.bias_grad import bias_grad
from lowp.ops.dequantize import dequantize
from lowp.ops.library import OPS
from lowp.ops.linear import linear
from lowp.ops.quantize import quantize
from lowp.ops.scaled_mm import scaled_mm
from lowp.reference import quantize as reference
from tests import (
    test_activation,
    test_bias_grad,
    test_linear_op,
    test_optim_ops,
    test_quantize,
    test_scaled_mm,
)
from tests.tensors import FLOATS, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
EDGES = (1, 3, 7, 8, 15, 16, 17, 33, 129)


@pytest.fixture(params=("cuda", "triton"))
def device_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each GPU backend, forced."""
    name = request.param
    reason = next(entry.reason for entry in status() if entry.name == name)
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    with lowp.backend(name):
        yield name


def to_device(x: Any) -> Any:
    """A tensor on the GPU with the strides and the storage offset that it has here."""
    if isinstance(x, list):
        return [to_device(t) for t in x]
    if not isinstance(x, Tensor):
        return x
    size = x.untyped_storage().nbytes() // max(x.element_size(), 1)
    flat = x.detach().as_strided((size,), (1,), 0).cuda()
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def to_host(x: Any) -> Any:
    return tuple(t.cpu() for t in x) if isinstance(x, tuple) else x if x is None else x.cpu()


def write_back(here: Any, there: Any) -> None:
    """What an op changed in place, into the tensors of the test."""
    for mine, other in zip(here, there, strict=True):
        if isinstance(mine, list):
            write_back(mine, other)
        elif isinstance(mine, Tensor) and mine.numel() and 0 not in mine.stride():
            mine.detach().copy_(other.cpu())


@pytest.fixture
def kernels(device_backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The GPU kernels in the place of the CPU's, behind copies there and back."""
    def behind_copies(kernel: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            moved = [to_device(list(a) if isinstance(a, tuple) else a) for a in args]
            result = kernel(*moved)
            torch.cuda.synchronize()
            if in_place:
                write_back(args, moved)
            return to_host(result)

        return run

    for name, op in OPS.items():
        if device_backend in op.kernels:
            kernel = op.kernels[device_backend]
            replaced = behind_copies(kernel, name in test_optim_ops.OPS)
            monkeypatch.setitem(op.kernels, "cpu", replaced)
    monkeypatch.setattr("lowp.backend._forced", ["cpu"])
    return device_backend


@pytest.mark.parametrize("rounding", test_quantize.ROUNDINGS)
@pytest.mark.parametrize("granularity", test_quantize.GRANULARITIES)
def test_quantize_and_back(kernels: str, granularity: str, rounding: str) -> None:
    for dtype in FLOATS:
        test_quantize.test_kernel_equals_reference(None, dtype, granularity, rounding)
        test_quantize.test_dequantize_every_code(None, granularity, dtype)
    test_quantize.test_shapes_strides_and_threads(None, None, granularity, rounding)


@pytest.mark.parametrize("activation", test_activation.ALL)
def test_activation_grad(kernels: str, activation: str) -> None:
    for dtype in FLOATS:
        test_activation.test_kernel_equals_reference(None, dtype, activation)
    test_activation.test_strides_threads_and_mixed_types(None, activation)


def test_bias_grad_values(kernels: str) -> None:
    for dtype in FLOATS:
        test_bias_grad.test_kernel_equals_reference(None, dtype)
    test_bias_grad.test_strides_and_threads(None, None)


@pytest.mark.parametrize("kind", test_optim_ops.STATES, ids=str)
@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_updates(kernels: str, name: str, kind: object) -> None:
    for dtype in FLOATS:
        test_optim_ops.test_kernel_equals_reference(None, name, dtype, kind)
    test_optim_ops.test_special_values(None, name, kind)


def test_update_options(kernels: str) -> None:
    test_optim_ops.test_options(None)
    for name in ("adamw", "sgd"):
        test_optim_ops.test_found_inf_changes_nothing(name)
        test_optim_ops.test_strides_and_empty_neighbours(name)


@pytest.mark.parametrize("activation", product.ACTIVATIONS)
def test_epilogues(kernels: str, activation: str) -> None:
    test_scaled_mm.test_epilogue(None, activation)
    for dtype in FLOATS:
        test_linear_op.test_epilogue_is_exact(None, None, dtype, activation)


def test_products_of_all_layouts(kernels: str) -> None:
    test_scaled_mm.test_strides_offsets_and_empty(None)
    test_scaled_mm.test_large_shapes_and_the_largest_sums(None)
    for dtype in FLOATS:
        test_linear_op.test_strides_and_empty(None, dtype)
        test_linear_op.test_products_inside_the_bound(None, None, dtype)


def test_int8_sums_of_odd_shapes(device_backend: str) -> None:
    pool = test_scaled_mm.codes(129, 129).cuda()
    wide, one = pool.double(), torch.ones(1, device="cuda")
    for m, n, k in itertools.product(EDGES, repeat=3):
        y = scaled_mm(pool[:m, :k], pool[:n, :k], one, one, None, "none", torch.float32, False)[0]
        assert torch.equal(y.double(), wide[:m, :k] @ wide[:n, :k].t()), (m, n, k)


@pytest.mark.parametrize("shape", ((1024, 4096, 512), (300, 520, 4096), (4096, 4096, 256),
                                   (16, 4096, 4096)))
def test_tiles_of_every_size(device_backend: str, shape: tuple[int, int, int]) -> None:
    """Shapes that take each of the tiles; integers, so that every sum is exact in any order."""
    m, n, k = shape
    a, b = test_scaled_mm.codes(m, k).cuda(), test_scaled_mm.codes(n, k).cuda()
    row, col = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
    for out in FLOATS:
        arguments = (a, b, row, col, torch.randn(n, device="cuda"), "gelu", out, True)
        got = to_host(scaled_mm(*arguments))
        on_host = [t.cpu() if isinstance(t, Tensor) else t for t in arguments]
        assert all(map(same_bits, got, OPS["scaled_mm"].kernels["reference"](*on_host)))
    for dtype in (torch.bfloat16, torch.float16):
        x, w = (a % 4).to(dtype), (b % 4).to(dtype)
        for left, right in ((x, w), (x, w.t().contiguous().t()),
                            (x.t().contiguous().t(), w.t().contiguous().t())):
            y = linear(left, right, None, "none", torch.float32, False)[0]
            assert torch.equal(y.double(), x.double() @ w.double().t())


def test_side_stream_behind_a_busy_one(device_backend: str) -> None:
    """Kernels run on torch's current stream: the result waits for what is queued there before."""
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    want = quantize(x, "row", 0, "nearest", 0, None, 0, 4, 0)
    side = torch.cuda.Stream()
    target = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        target.copy_(x)
        got = quantize(target, "row", 0, "nearest", 0, None, 0, 4, 0)
    side.synchronize()
    assert all(map(same_bits, got, want))


def test_graph_replays_draw_afresh(device_backend: str) -> None:
    x = torch.rand(64, 512, device="cuda")
    step = torch.ones((), dtype=torch.int64, device="cuda")
    arguments = ("row", 0, "stochastic", 3, step, 5, 4, 0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        quantize(x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, _ = quantize(x, *arguments)
    seen = []
    for now in (2, 3, 4):
        step.fill_(now)
        graph.replay()
        torch.cuda.synchronize()
        seen.append(codes.clone())
        eager = reference.quantize(x.cpu(), "row", 0, "stochastic", 3, now, 5, 4, 0)[0]
        assert torch.equal(codes.cpu(), eager)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_graph_of_an_update_counts_on(device_backend: str) -> None:
    """Replays advance the steps on the device, and each equals an eager update of its number."""
    def case() -> dict[str, Any]:
        torch.manual_seed(0)
        params = [torch.randn(40, 300).bfloat16(), torch.randn(7, 5).bfloat16()]
        made = test_optim_ops.adamw_case(params, [torch.randn(p.shape) for p in params], "int8")
        moved = {key: to_device(value) for key, value in made.items()}
        moved["steps"] = [torch.zeros((), device="cuda") for _ in params]
        return moved

    graphed, eager = case(), case()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        adamw(*case().values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw(*graphed.values())
    for now in (1, 2, 3):
        graph.replay()
        adamw(*eager.values())
        torch.cuda.synchronize()
        assert [s.item() for s in graphed["steps"]] == [now, now]
        assert all(map(same_bits, graphed["params"], eager["params"]))
        assert all(map(same_bits, graphed["exp_avg_sqs"], eager["exp_avg_sqs"]))


def test_more_than_two_to_the_31_elements(device_backend: str) -> None:
    rows, cols = 2**20 + 1, 2048 + 16
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("20 GiB of GPU memory are not free")
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(3, cols).bfloat16()
    x[-3:] = tail.cuda()
    first = (rows - 3) * cols
    codes, scale = quantize(x, "row", 0, "stochastic", 1, None, 2, 4, 0)
    want = reference.quantize(tail, "row", 0, "stochastic", 1, 1, 2, 4, first)
    assert torch.equal(codes[-3:].cpu(), want[0]) and torch.equal(scale[-3:].cpu(), want[1])
    assert not codes[:-3].any()
    y = dequantize(codes, scale, "row", 0, torch.bfloat16)
    assert torch.equal(y[-3:].cpu(), dequantize_on_host(*want))


def dequantize_on_host(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes * scale).to(torch.bfloat16)


def test_the_gpu_s_own_nan(device_backend: str) -> None:
    """0/0 gives the device's NaN, whose payload must not matter."""
    zero = torch.zeros(4, 256, device="cuda")
    nan = zero / zero
    codes, scale = quantize(nan, "row", 0, "stochastic", 0, None, 0, 4, 0)
    assert not codes.any() and scale.isnan().all()
    assert bias_grad(nan).isnan().all()
    case = {k: to_device(v) for k, v in test_optim_ops.adamw_case(
        [torch.randn(4, 256).bfloat16()], [torch.ones(4, 256)], torch.bfloat16).items()}
    case["grads"] = [nan]
    adamw(*case.values())
    assert (case["params"][0].view(torch.int16) == 0x7FC0).all()


def test_another_device_than_the_current_one(device_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(64, 64, device="cuda:1")
    codes, _ = quantize(x, "row", 0, "nearest", 0, None, 0, 4, 0)
    assert torch.cuda.current_device() == 0
    assert torch.equal(codes.cpu(), reference.quantize(x.cpu(), "row", 0, "nearest")[0])
