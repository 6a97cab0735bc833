"""What the machine could do at best, beside what was done: bytes and operations over ceilings.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009. Every ceiling is measured in the process that
uses it, with torch's number of threads: bytes a second by torch, multiplying in place and copying,
beside every row and in as much memory as it touches (so a small one is held to the caches' speed),
of which the best counts (work that reads more than it writes can go a little beyond); operations a
second by loops of one instruction (ceilings.cpp). AMX's tiles are not among them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

UNITS = ("fp32", "bf16", "int8", "roots", "wide_products")
PRODUCTS = ("fp32", "bf16", "int8")  # share the ports of the processor, so their times add up
DRAW = 14 / 8  # wide products: 7 rounds of 2 make 8 draws (Philox4x32-7)
_streams: dict[tuple[int, int], float] = {}
_peaks: dict[int, dict[str, float]] = {}


class Work(NamedTuple):
    """The least that a call has to do."""

    bytes: float
    """Read and written: every element of every tensor once each."""
    operations: dict[str, float] = {}  # noqa: RUF012
    """By the unit that makes them, of :data:`UNITS`."""


def product(m: int, n: int, k: int, dtype: torch.dtype, out: torch.dtype | None = None) -> Work:
    """[m, k] times [k, n], multiplications and additions counted apart."""
    size, out_size = dtype.itemsize, (out or dtype).itemsize
    return Work(size * (m + n) * k + out_size * m * n, {unit_of(dtype): 2.0 * m * n * k})


def unit_of(dtype: torch.dtype) -> str:
    """What multiplies elements of a type: fp16, and where it has no instruction bf16, as fp32."""
    if dtype == torch.int8:
        return "int8" if "int8" in peaks() else "fp32"
    return "bf16" if dtype == torch.bfloat16 and "bf16" in peaks() else "fp32"


@functools.cache
def _loops() -> ctypes.CDLL:
    source = Path(__file__).resolve().parent / "ceilings.cpp"
    folder = tempfile.TemporaryDirectory()
    target = Path(folder.name) / "ceilings.so"
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-shared",
                    "-fPIC", str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    folder.cleanup()
    return library


def _best(run: Callable[[], object], times: int = 7) -> float:
    """The shortest of several runs' seconds, since a ceiling is what is possible."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def peaks(threads: int | None = None) -> dict[str, float]:
    """Operations a second of every unit that the processor has."""
    threads = threads or torch.get_num_threads()
    if threads not in _peaks:
        _peaks[threads] = {}
        warm = time.perf_counter() + 0.3  # until every thread has a processor of its own
        while time.perf_counter() < warm:
            _loops().fp32(ctypes.c_int64(200_000), threads)
        for unit in UNITS:
            loop = getattr(_loops(), unit)
            loop.restype, loop.argtypes = ctypes.c_double, (ctypes.c_int64, ctypes.c_int)
            operations = loop(200_000, threads)
            if operations:
                seconds = _best(lambda loop=loop: loop(200_000, threads))
                _peaks[threads][unit] = operations / seconds
    return _peaks[threads]


def _size(nbytes: float) -> int:
    return 1 << max(16, round(nbytes).bit_length())


def sample(work: Work) -> Work:
    """Look at the memory's speed beside a row; the best that was seen counts in the end."""
    size = _size(work.bytes)
    x = torch.ones(size // 4)
    half, other = x.chunk(2)
    calls = max(1, (1 << 24) // size)

    def in_place() -> None:
        for _ in range(calls):
            x.mul_(1.0)

    def copy() -> None:
        for _ in range(calls):
            other.copy_(half)

    rate = max(2 * size * calls / _best(in_place), size * calls / _best(copy))
    key = size, torch.get_num_threads()
    _streams[key] = max(rate, _streams.get(key, 0.0))
    return work


def stream(nbytes: float, threads: int) -> float:
    """Bytes a second, reads and writes together, in so much memory or in more."""
    return max(rate for (size, n), rate in _streams.items()
               if n == threads and size >= _size(nbytes))


def against(work: Work, seconds: float, threads: int) -> dict[str, Any]:
    """A row's share of the roofline: what bounds the work, and how near to it ``seconds`` is."""
    arithmetic = {unit: count / peaks(threads)[unit] for unit, count in work.operations.items()}
    products = sum(arithmetic.pop(unit, 0.0) for unit in PRODUCTS)
    bounds = {"memory": work.bytes / stream(work.bytes, threads), "products": products,
              **arithmetic}
    by = max(bounds, key=lambda name: bounds[name])
    return {"bytes": float(work.bytes), "operations": sum(work.operations.values()),
            "bound [s]": bounds[by], "bound by": by, "fraction of bound": bounds[by] / seconds}


def measured() -> dict[str, Any]:
    """The ceilings that were measured so far in this process, by threads."""
    def rounded(values: dict[Any, float]) -> dict[str, float]:
        return {str(key): float(f"{value:.4g}") for key, value in values.items()}

    return {
        f"{threads} threads": {
            "operations/s": rounded(_peaks.get(threads, {})),
            "bytes/s by size": rounded({size: rate for (size, n), rate in sorted(_streams.items())
                                        if n == threads}),
        }
        for threads in sorted({*_peaks, *(n for _, n in _streams)})
    }
