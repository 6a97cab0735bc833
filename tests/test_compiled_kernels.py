"""What the Triton kernels become on sm_80, sm_90, sm_100 and gfx942, without any of them here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.triton_ir import narrow_products

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "triton_compiled.json"
TENSOR_CORES = {  # of 16-bit floats, of int8 codes
    "sm_80": ("HMMA", "IMMA"), "sm_90": ("HGMMA", "IGMMA"), "sm_100": ("UTCMMA", "UTCMMA"),
    "gfx942": ("MFMA", "MFMA"),
}


def compiled(*arguments: str) -> Any:
    """What benchmarks/compiled.py prints, in a process whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.compiled", *arguments], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def now() -> list[dict[str, Any]]:
    """Every kernel for every target, compiled now."""
    return compiled("--json")["rows"]


def check(rows: list[dict[str, Any]]) -> None:
    """What no version of Triton may take away from any kernel."""
    for row in rows:
        assert row["spill bytes"] == 0 and "local" not in row, row
        assert row["32-bit products in addresses"] == 0, row
        assert 0 < row["registers"] <= 512 and row["shared bytes"] <= 227 * 1024, row
        scalars = ("advance", "totals", "weights", "sizes", "matrix_means")
        wide = "301 columns" not in row["case"] and row["kernel"] not in scalars
        if row["kernel"] in ("product", "persistent"):
            if "fp32" not in row["case"]:
                integer = row["case"].startswith("scaled_mm")
                assert row.get(TENSOR_CORES[row["target"]][integer], 0) > 0, row
            assert row["kernel"] != "persistent" or row["TMA load"] > 0, row
            if row["target"] == "sm_90" and "300 columns" not in row["case"]:
                assert row["kernel"] == ("product" if "fp32" in row["case"] else "persistent"), row
        elif wide:
            # gfx942's layouts give a thread 8 codes
            narrow = row["target"] == "gfx942"
            assert narrow or row.get("load 128", 0) > 0, row
            # by atomics, or a number a run
            reduces = row["kernel"] in ("tensor_amax", "column_amax", "amax", "runs", "norms",
                                         "row_means")
            assert reduces or narrow or row.get("store 128", 0) > 0, row


def test_every_kernel_compiles_for_every_target(now):
    check(now)
    assert {row["target"] for row in now} == set(TENSOR_CORES)
    kernels = ROOT / "kernels"
    ops = {path.stem for path in kernels.glob("*.py")}
    ops -= {"__init__", "launch", "numerics", "activation", "product", "update"}
    ran = " ".join(row["case"] for row in now)
    assert {op for op in ops if op not in ran} == {"linear_wgrad"}
    assert "linear gradients" in ran


def test_the_number_of_tokens_makes_no_other_kernel():
    """Over 1 to 257 tokens: one kernel a launch of the memory-bound ops; of the products one a tile
    that the model of the shape chooses (and one for the strides of a single token's gradient)."""
    for case, kernels in compiled("--keys").items():
        if case.startswith(("linear", "scaled_mm")):
            assert len(kernels) <= 3, case
        else:
            assert len(kernels) == len(set(kernels)), case


GOOD = """
  %0 = tt.get_program_id x : i32
  %1 = arith.extsi %0 : i32 to i64
  %2 = arith.muli %1, %stride : i64
  %3 = arith.muli %0, %c2_i32 : i32
  %4 = tt.addptr %x, %2 : !tt.ptr<f32>, i64
"""
LOOP = """
  %0 = tt.get_program_id x : i32
  %1 = arith.muli %0, %stride : i32
  %2:2 = scf.for %i = %a to %b step %c iter_args(%at = %1, %sum = %s) -> (i32, f32) : i32 {
    %3 = tt.addptr %x, %at : !tt.ptr<f32>, i32
    %4 = arith.addi %at, %one : i32
    scf.yield %4, %sum : i32, f32
  }
"""
YIELDED = """
  %0 = scf.if %c -> (tensor<8xi32>) {
    %1 = arith.muli %a, %b : tensor<8xi32>
    scf.yield %1 : tensor<8xi32>
  } else {
    scf.yield %b : tensor<8xi32>
  }
  %2 = tt.addptr %x, %0 : tensor<8x!tt.ptr<f32>>, tensor<8xi32>
"""


STRAIGHT = GOOD.replace("%4 = tt.addptr %x, %2", "%4 = tt.addptr %x, %3")


@pytest.mark.parametrize(("ir", "count"), [(GOOD, 0), (STRAIGHT, 1), (LOOP, 1), (YIELDED, 1)])
def test_the_lint_finds_narrow_products(ir, count):
    assert len(narrow_products(ir)) == count


def test_the_committed_table_is_of_these_sources():
    table = json.loads(RESULT.read_text())
    check(table["rows"])
    again = "python -m benchmarks.compiled writes it anew"
    assert table["sources"] == compiled("--hash"), again
