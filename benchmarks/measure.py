"""How everything here is timed: in one process, interleaved, medians; and what is recorded."""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lowp
from benchmarks import roofline
from lowp.doctor import cpu_model
from lowp.native import cpu_extension

RESULTS = Path(__file__).resolve().parent / "results"
Candidates = dict[str, Callable[[], object]]


AT_LEAST = 1.0  # seconds, so that calls of microseconds are not timed in one moment of the machine
ENOUGH = 20.0  # seconds after which five rounds are enough


def interleaved(candidates: Candidates, rounds: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each candidate over ``rounds``, of short calls more, of long ones fewer.

    One call of each a round, in an order that turns round every time, so a machine that slows down
    or speeds up does so for all of them.
    """
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    for index in itertools.count():
        passed = time.perf_counter() - began
        if (index >= rounds and passed > AT_LEAST) or (index >= 5 and passed > ENOUGH):
            break
        names = list(candidates)
        for name in names if index % 2 == 0 else reversed(names):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    extension = cpu_extension()
    return {
        "device": cpu_model(),
        "threads": torch.get_num_threads(),
        "instruction_set": extension.isa(),
        "cpu_features": extension.cpu_features(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowp": lowp.__version__,
        "compiler": extension.compiler,
        "commit": commit.stdout.strip(),
    }


def record(stem: str, rows: list[dict[str, Any]], **tables: list[dict[str, Any]]) -> Path:
    """Write the rows, with the environment and the ceilings that were measured, to
    ``results/<stem>.json``; numbers have 4 digits. The ``work`` of a row becomes its share of the
    roofline. ``tables`` are made from the rows, and stand beside them."""
    for row in rows:
        if "work" in row:
            threads = row.get("threads", torch.get_num_threads())
            row.update(roofline.against(row.pop("work"), row["lowp [s]"], threads))
    rounded = {
        name: [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
               for row in table]
        for name, table in {"rows": rows, **tables}.items()
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stem}.json"
    ceilings = roofline.measured()
    found = {"environment": environment(), **({"ceilings": ceilings} if ceilings else {}),
             **rounded}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def with_ratios(times: dict[str, float], ours: str) -> dict[str, float]:
    """Seconds of every candidate, and how many times as fast as each other one ``ours`` is."""
    row = {f"{name} [s]": seconds for name, seconds in times.items()}
    for name, seconds in times.items():
        if name != ours:
            row[f"{ours} is x times {name}"] = seconds / times[ours]
    return row
