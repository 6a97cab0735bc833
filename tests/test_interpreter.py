"""What Triton's interpreter gets wrong, so that we learn when it no longer does; and, interpreted,
what only sm_90 runs: the persistent product."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowp
from lowp.backend import status

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton does not interpret here", allow_module_level=True)
for _entry in status():
    if _entry.name == "triton" and not _entry.available:
        pytest.skip(_entry.reason, allow_module_level=True)

import triton.language as tl  # noqa: E402
from lowp.kernels import launch as launches  # noqa: E402
from lowp.kernels import product as products  # noqa: E402
from lowp.kernels import update as updates  # noqa: E402
from lowp.kernels.launch import EXACT, launch  # noqa: E402
from lowp.kernels.numerics import draws, widen  # noqa: E402

from lowp.ops.library import OPS  # noqa: E402
from lowp.reference.philox import draws as reference_draws  # noqa: E402
from tests.cases import assert_gradient_within, assert_within, codes, matrices  # noqa: E402
from tests.test_matrix_optim_ops import exact_muon_case  # noqa: E402
from tests.updates import cloned  # noqa: E402


@triton.jit
def _sum_bf16(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(a + i) + tl.load(b + i))


@triton.jit
def _widen(x, plain, ours, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(plain + i, value.to(tl.float32))
    tl.store(ours + i, widen(value))


@triton.jit
def _draws(out, first: tl.int64, N: tl.constexpr, GROUPED: tl.constexpr, low: tl.int64,
           high: tl.int64, step: tl.int64, tensor: tl.int64, role: tl.int64):
    start = first + tl.zeros([1], tl.int64)
    drawn = draws(start, N, GROUPED, low, high, step, tensor, role)
    tl.store(out + tl.arange(0, N)[None, :], drawn.to(tl.int32))


def test_canary_bf16_arithmetic_is_still_wrong():
    """Once this fails, the interpreter adds bf16 rightly and ``widen`` may become a plain cast."""
    a, b = torch.full((16,), 2.5).bfloat16(), torch.full((16,), 2.0).bfloat16()
    y = torch.empty(16, dtype=torch.bfloat16)
    launch(_sum_bf16, (1,), a, b, y, N=16, **EXACT)
    assert not torch.equal(y, a + b)


def test_canary_bf16_subnormals_are_still_wrong():
    x = (torch.arange(1, 17, dtype=torch.int16) * 5).view(torch.bfloat16)
    plain, ours = torch.empty(16), torch.empty(16)
    launch(_widen, (1,), x, plain, ours, N=16, **EXACT)
    assert torch.equal(ours, x.float())
    assert not torch.equal(plain, x.float())


@pytest.mark.parametrize("first", (0, 8, 2**36 + 8, 5, 2**36 + 5))
def test_draws_are_the_contract_s(first):
    seed, tensor = 0x0123456789ABCDEF, 0x811C9DC5
    want = reference_draws(seed, 1, tensor, 6, 64, first)
    for grouped in (False, True) if first % 8 == 0 else (False,):
        out = torch.empty(64, dtype=torch.int32)
        launch(_draws, (1,), out, first, N=64, GROUPED=grouped, low=seed & 0xFFFFFFFF,
               high=seed >> 32, step=1, tensor=tensor, role=6, **EXACT)
        assert torch.equal(out.long(), want)


@pytest.mark.parametrize("processors", (1, 3))
def test_the_persistent_product(monkeypatch, processors):
    """Its descriptors and walk over the tiles, with fewer programs than tiles."""
    monkeypatch.setattr(launches, "capability", lambda device: 90)
    monkeypatch.setattr(launches, "processors", lambda device: processors)
    started = []
    monkeypatch.setattr(products, "launch", lambda kernel, *args, **options: (
        started.append(kernel), launch(kernel, *args, **options)))
    x, w, dy, bias = matrices(200, 136, 72, torch.bfloat16)
    y = torch.empty(200, 136)
    products.product(x, w, products.Epilogue(y, bias=bias))
    assert_within(y, x, w, bias)
    dw, db = torch.empty(136, 72), torch.empty(136)
    products.product(dy.t(), x.t(), products.Epilogue(dw, row_sums=db))
    assert_within(dw, dy.t(), x.t())
    assert_within(db[:, None], dy.t(), torch.ones(1, 200))
    dz = torch.empty(200, 72)
    products.product(dy, w.t(), products.Epilogue(dz, x, activation="gelu", backward=True))
    assert_gradient_within(dz, dy, w, x, "gelu")
    a, b = codes(200, 80), codes(72, 80)
    y = torch.empty(200, 72)
    products.product(a, b, products.Epilogue(y, row_scale=torch.ones(1), col_scale=torch.ones(1)))
    assert torch.equal(y, a.float() @ b.float().t())
    assert [kernel.fn.__name__ for kernel in started] == ["_persistent"] * 4


def test_tensors_on_two_devices_are_refused():
    meta = torch.empty(16, device="meta", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="_sum_bf16: expected all tensors on cpu, got one"):
        launch(_sum_bf16, (1,), torch.zeros(16).bfloat16(), meta, meta, N=16, **EXACT)


def test_a_captured_graph_has_tables_of_its_own(monkeypatch):
    """They hold nothing before the graph is replayed, so no later call may find them."""
    totals = [torch.zeros(300)]
    members = updates.members_of((totals,), totals, [0], [0], None)
    monkeypatch.setattr(updates, "is_capturing", lambda: True)
    captured = updates.batch_of(members, None)
    monkeypatch.setattr(updates, "is_capturing", lambda: False)
    eager = updates.batch_of(members, None)
    assert eager is not captured and eager is updates.batch_of(members, None)
    monkeypatch.setattr(updates, "is_capturing", lambda: True)
    assert updates.batch_of(members, None) is not eager
    assert updates._captured[-2] is captured  # kept, as the graph reads them
    del updates._captured[-2:]


class Unread(TorchDispatchMode):
    """Whose tensors' values the host does not see."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_muon_waits_for_nothing(monkeypatch):
    """Steps, rate, scale, found_inf and the norms stay where they are, as a CUDA graph needs it."""
    monkeypatch.setattr("lowp.ops.muon.fp32", float)  # it rounds numbers of the host in a tensor
    case = exact_muon_case([(6, 20), (9, 272)], torch.bfloat16, "int8",
                           grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0))
    with lowp.backend("triton"), torch.no_grad():
        with Unread():
            OPS["muon"].kernels["triton"](*cloned(case).values())
        with pytest.raises(AssertionError), Unread():
            OPS["muon"].kernels["reference"](*cloned(case).values())
