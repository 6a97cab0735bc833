"""What lowp runs on here: versions, CPU, backends with their refusals, and a short self-test."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lowp
from lowp import native
from lowp.backend import backend, status
from lowp.key import Key
from lowp.ops.library import OPS

if TYPE_CHECKING:
    from rich.console import RenderableType

# csrc/kernel.h: Isa, each includes those before it
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
OPTIONAL = ("triton", "numpy", "safetensors", "tokenizers", "transformers", "datasets")
VARIABLES = ("LOWP_BACKEND", "LOWP_STRICT", "LOWP_CPU_ISA", "LOWP_REQUIRE_NATIVE",
             "TRITON_INTERPRET", "OMP_NUM_THREADS")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The CPU's model as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _inputs() -> Iterator[tuple[str, Tensor]]:
    """Small matrices of ragged shapes, with the values at which roundings go wrong."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 65504.0, 3e38, 0.5, -1.5, 2.5, 126.5, 127.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{dtype}, 17 x 131", torch.randn(17, 131, generator=generator).to(dtype)
        finite = special.clamp(-60000, 60000)
        yield f"{dtype}, special values", finite.repeat(3, 7).to(dtype)
        yield f"{dtype}, Inf and NaN", torch.tensor([[1.0, float("inf")], [float("nan"), 2.0],
                                                     [3.0, 4.0]]).to(dtype)
        yield f"{dtype}, no rows", torch.empty(0, 5, dtype=dtype)


def _bits(tensors: tuple[Tensor, ...]) -> list[bytes]:
    return [t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def _quantize(x: Tensor, granularity: str, rounding: str) -> tuple[Tensor, ...]:
    q = lowp.quantize(x, granularity, block=32, rounding=rounding, key=Key(1, 2, 3, 4))
    return q.codes, q.scale, lowp.dequantize(q)


def _cases() -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    for granularity in ("tensor", "row", "column", "block"):
        for rounding in ("nearest", "stochastic"):
            for name, x in _inputs():
                yield (f"quantize, {granularity}, {rounding}, {name}",
                       functools.partial(_quantize, x, granularity, rounding))


def _instruction_sets() -> Iterator[str]:
    """Each instruction set that this CPU runs, forced while it is tested; "" without kernels."""
    extension = native.cpu
    if extension is None:
        yield ""
        return
    before = extension.isa()
    try:
        for isa in ISAS[:ISAS.index(extension.best_isa()) + 1]:
            extension.set_isa(isa)
            yield isa
    finally:
        extension.set_isa(before)


def self_test() -> dict[str, Any]:
    """Run the CPU kernels of every instruction set against the reference, to be equal in bits.

    Returns:
        ``passed``, ``cases``, ``failures`` (each with its reason), ``seconds``, and ``backend``:
        the one tested, or only the reference where no kernel is loaded.
    """
    start = time.perf_counter()
    tested = "cpu" if native.cpu is not None else "reference"
    failures, count = [], 0
    for isa in _instruction_sets():
        for name, run in _cases():
            count += 1
            case = f"{name}, {isa}" if isa else name
            try:
                with backend("reference"):
                    expected = _bits(run())
                with backend(tested):
                    got = _bits(run())
            except Exception as error:  # whatever a broken build raises is the finding
                failures.append(f"{case}: {type(error).__name__}: {error}")
                continue
            if got != expected:
                failures.append(f"{case}: {tested} and reference differ")
    return {"passed": not failures, "cases": count, "failures": failures, "backend": tested,
            "seconds": round(time.perf_counter() - start, 3)}


def collect() -> dict[str, Any]:
    """Everything that a report of a problem needs, as plain values for JSON; takes under 5 s."""
    extension = native.cpu
    return {
        "versions": {
            "lowp": lowp.__version__, "python": platform.python_version(),
            "torch": str(torch.__version__), **{name: _version(name) for name in OPTIONAL},
        },
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "executable": sys.executable,
        "cpu": {
            "model": cpu_model(),
            "logical_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": [] if extension is None else list(extension.cpu_features()),
            "instruction_set": None if extension is None else extension.isa(),
            "best_instruction_set": None if extension is None else extension.best_isa(),
        },
        "native": {
            "loaded": extension is not None,
            "reason": native.cpu_refusal,
            "path": None if extension is None else extension.__file__,
            "compiler": None if extension is None else extension.compiler,
        },
        "backends": [entry._asdict() for entry in status()],
        "ops": {name: sorted(op.kernels) for name, op in sorted(OPS.items())},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "self_test": self_test(),
    }


def render(found: dict[str, Any]) -> Iterator[RenderableType]:
    """What :func:`collect` found, as tables for the terminal."""
    from rich.table import Table
    from rich.text import Text

    cpu, extension, test = found["cpu"], found["native"], found["self_test"]
    facts = Table(title="lowp doctor", title_justify="left", show_header=False)
    rows = {
        **{name: version or "not installed" for name, version in found["versions"].items()},
        "system": found["system"],
        "python": f"{found['versions']['python']} ({found['executable']})",
        "CPU": f"{cpu['model']}, {cpu['logical_cores']} logical cores, {cpu['threads']} threads",
        "CPU features": ", ".join(cpu["features"]) or "unknown: no native kernels",
        "instruction set": f"{cpu['instruction_set']} (best here: {cpu['best_instruction_set']})"
        if extension["loaded"] else "none: no native kernels",
        "native kernels": f"{extension['path']}, built by {extension['compiler']}"
        if extension["loaded"] else extension["reason"],
        **found["environment"],
    }
    for name, value in rows.items():
        facts.add_row(name, Text(str(value)))
    yield facts
    backends = Table(title="backends", title_justify="left")
    for column in ("backend", "runs here", "reason"):
        backends.add_column(column)
    for entry in found["backends"]:
        mark = Text("yes", "green") if entry["available"] else Text("no", "yellow")
        backends.add_row(entry["name"], mark, Text(entry["reason"]))
    yield backends
    against = "bitwise against the reference" if test["backend"] == "cpu" else "reference only"
    verdict = f"{test['cases']} cases, {against}, {test['seconds']} s"
    if test["passed"]:
        yield Text(f"self-test passed: {verdict}", "green")
        return
    yield Text(f"self-test FAILED: {len(test['failures'])} of {verdict}", "bold red")
    for failure in test["failures"][:10]:
        yield Text(f"  {failure}")
