"""What an install leaves behind: without a compiler, as a wheel, and where that is forbidden."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_doctor import doctor_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that are installed, without anything that was built."""
    folder = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("lowp", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "cuda_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build one as pip does, but in this environment: one of its own would need a network."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("LOWP_")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v",
               "--wheel-dir", str(out), str(source)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**plain, "LOWP_CUDA": "0", **environment})


def contents(out: Path) -> zipfile.ZipFile:
    (path,) = out.glob("lowp-*.whl")
    return zipfile.ZipFile(path)


def test_without_a_compiler_it_is_pure_python_and_says_so(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "NATIVE KERNELS NOT BUILT, installing pure Python" in done.stdout + done.stderr
    files = contents(tmp_path)
    record = json.loads(files.read("lowp/_build.json"))
    assert not record["native"] and "/no/such/compiler" in record["reason"]
    assert not [name for name in files.namelist() if name.endswith(".so")]
    installed = tmp_path / "installed"
    files.extractall(installed)
    doctor = doctor_of(installed)
    assert doctor.returncode == 0, doctor.stderr
    found = json.loads(doctor.stdout)
    assert "/no/such/compiler" in found["native"]["reason"], "the doctor repeats the reason"


def test_a_build_that_must_not_fail_fails(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CXX="/no/such/compiler", LOWP_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "LOWP_REQUIRE_NATIVE=1 and the build failed" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_wheel_has_kernels_and_types_and_needs_no_source(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, LOWP_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    files = contents(tmp_path)
    names = files.namelist()
    assert "lowp/py.typed" in names and "lowp/kernels/__init__.py" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    installed = tmp_path / "installed"
    files.extractall(installed)
    doctor = doctor_of(installed)
    assert doctor.returncode == 0, doctor.stderr
    found = json.loads(doctor.stdout)
    assert found["native"]["path"].startswith(str(installed)) and found["self_test"]["passed"]
