"""Collects the rows of each benchmark file and records them when the file is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Candidates, interleaved, record, with_ratios
from benchmarks.roofline import Work, sample

Compare = Callable[..., None]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """The file's rows; written to results/ at its end."""
    found: list[dict[str, Any]] = []
    yield found
    if found:
        path = record(Path(request.path).stem, found)
        table = Table(title=str(path))
        columns = list(dict.fromkeys(column for row in found for column in row))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in found:
            values = [row.get(column, "") for column in columns]
            table.add_row(*[f"{v:.3g}" if isinstance(v, float) else str(v) for v in values])
        Console(width=180).print(table)


@pytest.fixture
def compare(rows: list[dict[str, Any]], benchmark: Any) -> Compare:
    """Time candidates interleaved, add a row; pytest-benchmark times ours once more by itself."""

    def run(labels: dict[str, Any], candidates: Candidates, ours: str,
            work: Work | None = None) -> None:
        times = interleaved(candidates)
        row: dict[str, Any] = dict(with_ratios(times, ours))
        if work is not None:
            row["work"] = sample(work)
        rows.append({**labels, **row})
        benchmark.extra_info.update(times)
        benchmark.pedantic(candidates[ours], rounds=5, warmup_rounds=1)

    return run
