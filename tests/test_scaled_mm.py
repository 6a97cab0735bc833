"""scaled_mm: exact sums, and every bit after them equal to the reference."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import time

import pytest
import torch

from lowp.native import cpu_extension
from lowp.ops.product import ACTIVATIONS
from lowp.ops.scaled_mm import MAX_K, scaled_mm
from tests import cases
from tests.cases import codes
from tests.targets import CPU
from tests.tensors import FLOATS, same_bits

ONE = torch.ones(1)


def sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The int32 sums: exact in fp32 as long as they stay below 2^24 (K <= 1040)."""
    return scaled_mm(a, b, ONE, ONE, None, "none", torch.float32, False)[0]


def assert_bits(*args) -> None:
    cases.assert_bits(CPU, scaled_mm, *args)


def test_sums_are_exact_over_ten_thousand_shapes(product_isa):
    pool_a, pool_b = codes(129, 129), codes(129, 129)
    wide_a, wide_b = pool_a.double(), pool_b.double()
    rng = random.Random(1)
    shapes = cases.edge_shapes()
    shapes += [tuple(rng.randint(1, 129) for _ in range(3)) for _ in range(2600)]
    for m, n, k in shapes:  # 3,329 shapes for each of four instruction sets
        y = sums(pool_a[:m, :k], pool_b[:n, :k])
        assert torch.equal(y.double(), wide_a[:m, :k] @ wide_b[:n, :k].t())


def test_large_shapes_and_the_largest_sums(product_isa):
    for m, n, k in ((300, 530, 2100), (1, 700, 5000), (450, 1, 300), (230, 260, 1025),
                    (950, 270, 2052), (470, 20, 4612)):  # blocks share panels, or have too many
        assert_bits(codes(m, k), codes(n, k), torch.rand(m), torch.rand(n), None, "none",
                    torch.float32, False)
    for left, right in itertools.product((127, -127), repeat=2):
        a = torch.full((1, MAX_K), left, dtype=torch.int8)
        y = sums(a, torch.full((1, MAX_K), right, dtype=torch.int8))
        assert y.item() == torch.tensor(float(left * right * MAX_K)).item()
    a = torch.full((3, 131_071), -128, dtype=torch.int8)
    assert torch.equal(sums(a, a), torch.full((3, 3), 16384.0 * 131_071))


def test_few_rows(product_isa):
    """Rows of b that are read where they lie: ragged, strided, at odd addresses, by threads."""
    before = torch.get_num_threads()
    pool = codes(331, 1100)
    pool[:4, :70] = -128
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for m, n, k in itertools.product((1, 2, 5, 6, 11, 16, 17), (64, 67, 130, 300),
                                         (64, 65, 127, 192, 1000)):
            a, b = codes(m, k + 3)[:, 3:], pool[:n, 5 : k + 5]
            scales = torch.rand(m), torch.rand(n)
            assert_bits(a, b, *scales, torch.randn(n), "relu", torch.bfloat16, True)
        a, b = codes(2, 4096), codes(1030, 4096)  # enough to be shared
        assert_bits(a, b, ONE, ONE, None, "none", torch.float32, False)
    torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(product_isa, activation):
    for out in FLOATS:
        for op, args in cases.scaled_mm_calls(activation, out):
            cases.assert_bits(CPU, op, *args)


def test_poisoned_groups_show(product_isa):
    a, b = codes(5, 8), codes(6, 8)
    a[2], b[3] = 0, 0
    row_scale, col_scale = torch.rand(5), torch.rand(6)
    row_scale[2], col_scale[3] = math.nan, math.nan
    for out in FLOATS:
        y = scaled_mm(a, b, row_scale, col_scale, None, "none", out, False)[0]
        want = torch.zeros(5, 6, dtype=torch.bool)
        want[2], want[:, 3] = True, True
        assert torch.equal(y.isnan(), want)


def test_outputs_that_go_past_the_caches(product_isa):
    """32 MB of fp32 or more are stored so, where rows are whole registers; their parts are not."""
    for n in (2048, 2056, 2050):
        a, b = codes(4096, 8), codes(n, 8)
        scale = torch.rand(4096)
        others = torch.rand(n), torch.randn(n), "relu", torch.float32, True
        whole = scaled_mm(a, b, scale, *others)
        parts = [scaled_mm(a[i : i + 1024], b, scale[i : i + 1024], *others)
                 for i in range(0, 4096, 1024)]
        for found, *pieces in zip(whole, *parts, strict=True):
            assert same_bits(found, torch.cat(pieces)), n


def test_strides_offsets_and_empty(product_isa):
    for op, args in cases.scaled_mm_stride_calls():
        cases.assert_bits(CPU, op, *args)


def test_threads_do_not_change_bits(threads):
    a, b = codes(333, 700), codes(290, 700)
    assert_bits(a, b, torch.rand(333), torch.rand(290), torch.rand(290), "silu", torch.bfloat16,
                True)


def test_after_fork_there_is_no_hang():
    """The child of a fork has lost the thread pool; it must run serially, not wait for it."""
    a = codes(600, 600)
    want = sums(a, a).numpy().tobytes()
    pid = os.fork()
    if pid == 0:  # torch's own parallel ops would hang here, so bytes are compared
        os._exit(0 if sums(a, a).numpy().tobytes() == want else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child hangs")


def test_errors():
    a, b, s = codes(3, 4), codes(5, 4), torch.ones(3)
    t = torch.ones(5)
    half = torch.float16
    cases = [
        (TypeError, "a must be int8, got torch.uint8", (a.byte(), b, s, t, None, "none", half)),
        (ValueError, r"expected a \[M, K\] and b \[N, K\], got \(3, 4\) and \(4, 5\)",
         (a, b.t(), s, t, None, "none", half)),
        (TypeError, "row_scale must be float32, got torch.float64",
         (a, b, s.double(), t, None, "none", half)),
        (ValueError, r"col_scale must have 5 elements or 1, got \(3,\)",
         (a, b, s, s, None, "none", half)),
        (ValueError, r"bias must have shape \(5,\), got \(3,\)", (a, b, s, t, s, "none", half)),
        (ValueError, "activation must be one of", (a, b, s, t, None, "tanh", half)),
        (TypeError, "out_dtype must be float32", (a, b, s, t, None, "none", torch.int32)),
        (ValueError, "K must be at most 133144, .*got 133145",
         (codes(1, MAX_K + 1), codes(1, MAX_K + 1), ONE, ONE, None, "none", half)),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            scaled_mm(*arguments, False)


def test_opcheck():
    for a in (codes(6, 8), codes(0, 8), codes(8, 6).t(), codes(12, 8)[::2]):
        arguments = (a, codes(5, 8), torch.ones(a.shape[0]), torch.ones(5), torch.ones(5))
        for dtype in FLOATS:
            torch.library.opcheck(torch.ops.lowp.scaled_mm.default,
                                  (*arguments, "gelu", dtype, True))


def test_the_best_instruction_set_is_the_default():
    assert cpu_extension().isa() == cpu_extension().best_isa()
