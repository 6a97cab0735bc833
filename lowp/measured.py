"""What a measurement found each backend to take for products, by their sizes, on one device.

``python -m benchmarks.gpu compare`` writes ``measured.json`` beside this module. Without it, or on
another device, backends are tried in their plain order (:mod:`lowp.backend`).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("measured.json")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
REACH = 2.0
"""A measurement speaks for products within this factor of it in M, N and K."""

SIZES: dict[str, Callable[..., tuple[int, int, int]]] = {
    "linear": lambda x, w, *_: (x.shape[0], w.shape[0], x.shape[1]),
    "linear_dgrad": lambda dy, w, *_: (dy.shape[0], w.shape[1], dy.shape[1]),
    "linear_wgrad": lambda dy, x, *_: (dy.shape[1], x.shape[1], dy.shape[0]),
    "scaled_mm": lambda a, b, *_: (a.shape[0], b.shape[0], a.shape[1]),
}
"""M, N and K of the product that an op's arguments make."""


class Problem(NamedTuple):
    """One product: the type of its operands, as in recipes, and its sizes."""

    precision: str
    sizes: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.precision} {' x '.join(map(str, self.sizes))}"


def problem_of(op: str, args: tuple[Any, ...]) -> Problem | None:
    """The product of a call; ``None`` for ops that are none, and where nothing was measured."""
    if op not in SIZES or not _table().rows:
        return None
    return Problem(DTYPES[args[0].dtype], SIZES[op](*args))


class Table(NamedTuple):
    """The measurement: its device, and microseconds by backend of every problem of an op."""

    device: str
    rows: dict[str, dict[Problem, dict[str, float]]]


@functools.lru_cache(maxsize=1)
def _table() -> Table:
    if not FILE.exists():
        return Table("", {})
    found = json.loads(FILE.read_text())
    table = Table(found["device"], {})
    for row in found["rows"]:
        problem = Problem(row["precision"], tuple(row["sizes"]))
        table.rows.setdefault(row["op"], {})[problem] = row["microseconds"]
    return table


@functools.cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else ""


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, problem: Problem) -> Mapping[str, float]:
    """The times of the measured problem with the least ratio of sizes, none of them beyond reach.

    The ratio is of what is larger to what is smaller, times that of the other sizes.
    """
    def ratios(measured: Problem) -> list[float]:
        pairs = zip(measured.sizes, problem.sizes, strict=True)
        return [max(a, b) / max(1, min(a, b)) for a, b in pairs]

    rows = {p: times for p, times in _table().rows.get(op, {}).items()
            if p.precision == problem.precision and max(ratios(p)) <= REACH}
    return rows[min(rows, key=lambda p: math.prod(ratios(p)))] if rows else {}


def times(op: str, device: torch.device, problem: Problem | None) -> Mapping[str, float]:
    """Microseconds by backend of a product like this one on ``device``; empty: not measured."""
    if problem is None or not _table().rows or _device_name(device.index) != _table().device:
        return {}
    return _nearest(op, problem)
