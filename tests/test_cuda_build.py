"""What the build of the CUDA kernels asks for, and what it leaves when it fails."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_build
from lowp import native
from lowp.backend import BackendError, backend, status

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("LOWP_CUDA", "LOWP_CUDA_ARCHS", "CUDA_HOME", "CUTLASS_PATH"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_architectures(clean: pytest.MonkeyPatch) -> None:
    assert cuda_build.archs() == ("sm_80", "sm_90a")
    clean.setenv("LOWP_CUDA_ARCHS", " sm_90a ,")
    assert cuda_build.archs() == ("sm_90a",)
    clean.setenv("LOWP_CUDA_ARCHS", "sm_90")
    with pytest.raises(cuda_build.CudaError, match="expected some of sm_80, sm_90a, got 'sm_90'"):
        cuda_build.archs()
    assert cuda_build.requirements() == []


def test_when_it_is_built(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(cuda_build, "find_nvcc", lambda: Path("nvcc"))
    clean.setattr(cuda_build, "gpu_is_visible", lambda: False)
    assert "no NVIDIA GPU was visible" in cuda_build.refusal()
    clean.setattr(cuda_build, "gpu_is_visible", lambda: True)
    assert cuda_build.refusal() == "" and cuda_build.requirements() == [cuda_build.CUTLASS]
    clean.setenv("LOWP_CUDA", "0")
    assert cuda_build.refusal() == "LOWP_CUDA=0" and cuda_build.requirements() == []
    clean.delenv("LOWP_CUDA")
    clean.setattr(cuda_build, "find_nvcc", lambda: None)
    assert "nvcc was not found" in cuda_build.refusal()
    clean.setenv("LOWP_CUDA", "1")
    assert cuda_build.refusal() == ""
    with pytest.raises(cuda_build.CudaError, match="nvcc was not found: put it on PATH"):
        cuda_build.find_toolkit()


def test_a_failed_build_leaves_the_cpu_module(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a broken compiler the install succeeds, and writes down why there is no module."""
    pytest.importorskip("setuptools", reason="the build backend is not installed here")
    for name in ("setup.py", "cuda_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    (tmp_path / "csrc" / "cpu").mkdir()  # kernels are not compiled again: a library may lack them
    for package in ("lowp", "kernels"):
        (tmp_path / package).mkdir()
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (tmp_path / "toolkit" / "lib").mkdir()
    (tmp_path / "toolkit" / "lib" / "libcudart_static.a").touch()
    nvcc.write_text("#!/bin/sh\necho 'error: this compiler is broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    environment = {**os.environ, "LOWP_CUDA": "1", "CUDA_HOME": str(nvcc.parent.parent),
                   "CUTLASS_PATH": str(tmp_path)}
    environment.pop("LOWP_REQUIRE_NATIVE", None)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = functools.partial(subprocess.run, command, cwd=tmp_path, capture_output=True, text=True)
    done = run(env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "lowp" / "_build.json").read_text())
    assert record["native"] and not record["cuda"]
    assert "this compiler is broken" in record["cuda_reason"]
    assert "CUDA KERNELS NOT BUILT" in done.stderr
    assert list((tmp_path / "lowp").glob("_cpu*")) and not list((tmp_path / "lowp").glob("_cuda*"))
    environment["LOWP_REQUIRE_NATIVE"] = "1"
    done = run(env=environment)
    assert done.returncode != 0 and "this compiler is broken" in done.stderr


def test_a_machine_without_a_gpu_says_so() -> None:
    """The refusal names its cause, and asking for the backend is an error that repeats it."""
    entry = next(entry for entry in status() if entry.name == "cuda")
    if entry.available:
        pytest.skip("CUDA kernels run here")
    assert entry.reason == native.cuda_refusal or "CUDA" in entry.reason
    with pytest.raises(BackendError) as raised, backend("cuda"):
        pass
    assert entry.reason in str(raised.value)
