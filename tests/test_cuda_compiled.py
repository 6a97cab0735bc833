"""The CUDA kernels compile for sm_80 and sm_90a, to what the committed table says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cuda_build
from lowp import native

pytest.importorskip("pybind11", reason="the test extra is not installed")
from benchmarks import cuda_compiled

ROOT = Path(__file__).resolve().parents[1]
TABLE = json.loads(cuda_compiled.RESULT.read_text())
MEMORY_BOUND = ("Gradient", "AdamWBody", "SgdBody", "LionBody", "MomentumBody", "StepBody",
                "Sum>", "Decode", "EpilogueBody", "Addition", "SquareRuns", "RowMeans",
                "ColumnMeans", "Norms", "Move", "Spans", "Lines", "Encode", "Both", "Plain")
SUMS = ("Lines", "SquareRuns", "RowMeans", "Norms")  # write one number a row, column or run


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module, built for both architectures."""
    try:
        cuda_build.find_toolkit()
    except cuda_build.CudaError as error:
        pytest.skip(f"no CUDA toolkit here: {error}")
    if cuda_build.find_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump here: the test extra is not installed")
    return cuda_compiled.build(tmp_path_factory.mktemp("cuda"))


def rows(arch: str, word: str) -> list[dict[str, int]]:
    found = [row for name, row in TABLE["kernels"][arch].items() if word in name]
    assert found, f"{word} is not compiled for {arch}"
    return found


def test_the_table_is_what_the_sources_compile_to(module: Path) -> None:
    found = json.loads(json.dumps(cuda_compiled.read(module)))
    assert {arch: set(kernels) for arch, kernels in found.items()} == {
        arch: set(kernels) for arch, kernels in TABLE["kernels"].items()}
    if cuda_build.find_toolkit().version == TABLE["compiler"]:
        again = "python -m benchmarks.cuda_compiled writes it anew"
        assert found == TABLE["kernels"], again


def test_the_module_loads_without_a_driver(module: Path) -> None:
    """No GPU library among its dependencies; its hash is that of the sources."""
    code = ("import importlib.util as u, sys; s = u.spec_from_file_location('_cuda', sys.argv[1]); "
            "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.source_hash, m.archs)")
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    csrc = cuda_build.CUDA.parent
    assert done.stdout.split() == [native.source_hash(csrc), ",".join(cuda_build.ARCHS)]
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "not found" not in needed


def test_no_driver_is_a_named_error(module: Path) -> None:
    """Without a driver the first launch fails with the op's name, and nothing before it does."""
    code = ("import importlib.util as u, sys; s = u.spec_from_file_location('_cuda', sys.argv[1]); "
            "m = u.module_from_spec(s); s.loader.exec_module(m); "
            "m.bias_grad(m.Place(0, 0), 16, 0, 1, 1, 16, 16)")
    if cuda_build.gpu_is_visible():
        pytest.skip("a GPU is visible here")
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True)
    assert re.search(r"RuntimeError: lowp::bias_grad: CUDA error \w+", done.stderr), done.stderr


@pytest.mark.parametrize("arch", cuda_build.ARCHS)
def test_no_kernel_spills(arch: str) -> None:
    for name, row in TABLE["kernels"][arch].items():
        assert row["spilled bytes"] == row["stack bytes"] == row["local memory"] == 0, name


@pytest.mark.parametrize("arch", cuda_build.ARCHS)
def test_memory_bound_kernels_move_sixteen_bytes_at_once(arch: str) -> None:
    for word in MEMORY_BOUND:
        for row in rows(arch, word):
            assert row["16-byte loads"] > 0, word
            if word not in SUMS:
                assert row["16-byte stores"] > 0, word


def test_products_use_the_tensor_cores() -> None:
    for arch in cuda_build.ARCHS:
        assert all(row["HMMA"] for row in rows(arch, "HalfMma"))
        assert all(row["IMMA"] for row in rows(arch, "CodeMma"))
    kinds = {"F32BF16BF16": "HGMMA", "F32F16F16": "HGMMA", "S32S8S8": "IGMMA"}
    for kind, instruction in kinds.items():
        found = rows("sm_90a", kind)
        assert all(row[instruction] and row["16-byte loads"] for row in found)
        assert len(found) == (3 if kind == "S32S8S8" else 12)  # tiles, times layouts, sums of rows


def test_every_launch_goes_through_the_guarded_one() -> None:
    """One place launches: it guards the device, takes a stream and checks for errors."""
    launch: dict[str, list[Any]] = {}
    for path in sorted(cuda_build.CUDA.iterdir()):
        text = path.read_text()
        launch[path.name] = re.findall(r"<<<|cudaLaunch\w*\(|cuLaunch\w*\(", text)
    assert [name for name, calls in launch.items() if calls] == ["launch.cu"]
    assert launch["launch.cu"] == ["cudaLaunchKernelExC("]
