"""Updates of more than 2^31 elements: the last 64 are updated like 64 of their own."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from lowp.ops.adafactor import adafactor
from lowp.ops.adamw import adamw
from lowp.ops.lion import lion
from lowp.ops.sgd import sgd
from tests.tensors import same_bits

PIECE, TAIL = 2**26, 64
N = 2**31 + TAIL
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # linux/mman.h
EMPTY = torch.empty(0)


@contextmanager
def zeros(dtype: torch.dtype) -> Iterator[Tensor]:
    """N zeros, of which all but the tail are one piece of memory, mapped again and again.

    So an update may only leave them as they are.
    """
    size = N * dtype.itemsize
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    begin = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    memory = os.memfd_create("zeros")
    os.ftruncate(memory, PIECE + mmap.PAGESIZE)
    for at in range(0, size, PIECE):
        length = min(PIECE, size - at)
        where = libc.mmap(begin + at, length, mmap.PROT_READ | mmap.PROT_WRITE,
                          mmap.MAP_SHARED | MAP_FIXED, memory, 0 if length == PIECE else PIECE)
        assert where == begin + at, os.strerror(ctypes.get_errno())
    buffer = (ctypes.c_char * size).from_address(begin)
    yield torch.frombuffer(buffer, dtype=dtype)
    libc.munmap(begin, size)
    os.close(memory)


HALF = torch.bfloat16
CASES = {  # the states that are as long as the parameter, and the rest of a call
    "sgd": (sgd, [HALF], lambda states, scales: (*states, *scales), (0.9, 0.0, 0.1, False, False)),
    "lion": (lion, [torch.int8], lambda states, scales: (*states, *scales),
             (0.9, 0.99, 0.1, False)),
    "adamw": (adamw, [torch.int8, torch.uint8], lambda states, scales: (*states, *scales, []),
              (0.9, 0.99, 0.1, 1e-8, False)),
    "adafactor": (adafactor, [torch.float32], lambda states, _: ([EMPTY], [EMPTY], *states),
                  (-0.8, 1e-3, 1e-3, 2.0, 0.1, False)),
}


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
@pytest.mark.parametrize("name", CASES)
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """Muon is left out, whose products would take minutes; its offsets are tested elsewhere."""
    op, dtypes, arranged, hyper = CASES[name]
    lr = torch.tensor(1e-2, dtype=torch.float64)
    roundings = ("stochastic",) * (1 if name == "adafactor" else 2)

    def update(tensors: list[Tensor], offset: int) -> None:
        p, g, *states = tensors
        scales = [[torch.zeros(-(-p.numel() // 256)) if s.dtype.itemsize == 1 else EMPTY]
                  for s in states]
        op([p], [g], *arranged([[s] for s in states], scales), [torch.zeros(())], lr, *hyper,
           *roundings, 3, [5], [offset], None, None)

    small = [torch.zeros(TAIL, dtype=d) for d in (HALF, HALF, *dtypes)]
    small[1].copy_(torch.randn(TAIL))
    with ExitStack() as stack:
        huge = [stack.enter_context(zeros(t.dtype)) for t in small]
        huge[1][-TAIL:] = small[1]
        update(huge, 0)
        update(small, N - TAIL)
        assert small[0].count_nonzero() > 60
        for a, b in zip(huge, small, strict=True):
            assert same_bits(a[-TAIL:], b) and not a[: PIECE // 4].any()
