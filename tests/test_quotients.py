"""The division by a scale that the CPU's 8-bit states make without a division is IEEE's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lowp import native

ROOT = Path(__file__).parents[1]


def test_every_quotient_near_the_middle_of_two_floats(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no compiler {compiler[0]}")
    if native.cpu_extension().best_isa() == "baseline":
        pytest.skip("this CPU lacks AVX2")
    target = tmp_path / "quotients"
    subprocess.run([*compiler, "-std=c++17", "-O3", "-mavx2", "-mfma", "-mf16c",
                    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
                    "-DLOWP_ISA=avx2", f"-I{ROOT / 'csrc'}", str(ROOT / "tests/quotients.cpp"),
                    "-o", str(target)], check=True)
    done = subprocess.run([target], capture_output=True, text=True, check=True)
    tried, wrong = map(int, done.stdout.split())
    assert tried > 6e7 and wrong == 0
