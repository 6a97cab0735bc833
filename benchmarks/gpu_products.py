"""CUDA against Triton, a product of every type and size: what lowp chooses by on this device.

    python -m benchmarks.gpu_products

writes ``lowp/measured.json`` anew, which :mod:`lowp.measured` reads; sizes are a factor of 4 apart,
so that every product between the least and the largest is within reach of one.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lowp
from benchmarks.gpu_timing import codes, copies, interleaved, random
from benchmarks.measure import environment
from lowp import measured
from lowp.measured import DTYPES, Problem
from lowp.ops.library import OPS

BACKENDS = ("cuda", "triton")
TOKENS, FEATURES = (16, 64, 256, 1024, 4096, 16384), (1024, 4096, 16384)
LARGEST = 2**40  # products of one problem: 2 ms at 1000 TFLOP/s


def problems() -> Iterator[tuple[str, Problem]]:
    """Every op, type and size."""
    for tokens, cols, out in itertools.product(TOKENS, FEATURES, FEATURES):
        if tokens * cols * out > LARGEST:
            continue
        for precision in ("bf16", "fp16"):
            yield "linear", Problem(precision, (tokens, out, cols))
            yield "linear_dgrad", Problem(precision, (tokens, out, cols))
            yield "linear_wgrad", Problem(precision, (out, cols, tokens))
        yield "scaled_mm", Problem("int8", (tokens, out, cols))


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Operands whose sums are exact in any order, so that both backends have the same bits."""
    return torch.randint(-3, 4, shape, device="cuda").to(dtype)


def arguments(op: str, problem: Problem, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Of one call of ``op`` that makes this product, with a bias where the op has one."""
    m, n, k = problem.sizes
    dtype = next(d for d, name in DTYPES.items() if name == problem.precision)
    if op == "scaled_mm":
        scales = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        return codes(m, k), codes(n, k), *scales, None, "none", torch.bfloat16, False
    if op == "linear":
        x, w, bias = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=dtype)
        return x, w, bias, "none", dtype, False
    if op == "linear_dgrad":
        return draw(m, k, dtype=dtype), draw(k, n, dtype=dtype), None, "none", dtype
    return draw(k, m, dtype=dtype), draw(k, n, dtype=dtype), True, dtype


def on(backend: str, op: str, sets: list[tuple[Any, ...]]) -> Callable[[int], Any]:
    """The call of buffer i by one backend."""
    def call(i: int) -> Any:
        with lowp.backend(backend):
            return OPS[op](*sets[i])

    return call


def agree(op: str, problem: Problem) -> bool:
    """Whether the backends have the same bits."""
    args = [arguments(op, problem, integers)]
    found = [on(name, op, args)(0) for name in BACKENDS]
    first, second = ([x] if isinstance(x, Tensor) else list(x) for x in found)
    return all(map(torch.equal, first, second))


def main() -> None:
    """Time everything; the file is written anew at the end."""
    rows = []
    for op, problem in problems():
        if not agree(op, problem):
            sys.exit(f"{op} {problem}: {' and '.join(BACKENDS)} differ; nothing is written")
        sets = copies(functools.partial(arguments, op, problem, random))
        calls = {name: on(name, op, sets) for name in BACKENDS}
        taken = {name: round(median(times) * 1e6, 2) for name, times in interleaved(calls).items()}
        rows.append({"op": op, **problem._asdict(), "microseconds": taken})
        del sets, calls
    found = {"device": torch.cuda.get_device_name(), "environment": environment()}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    measured.FILE.write_text(f'{json.dumps(found, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    sys.stdout.write(f"{len(rows)} products in {measured.FILE.name}\n")


if __name__ == "__main__":
    main()
