"""The doctor tells the truth, of a healthy and of a broken install."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lowp
from lowp import doctor, native


def shown(found: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in doctor.render(found):
        console.print(part)
    return console.export_text()


def test_collect_is_complete_and_plain() -> None:
    found = doctor.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["versions"]["lowp"] == lowp.__version__
    assert {entry["name"] for entry in found["backends"]} == {"cpu", "cuda", "triton", "reference"}
    for entry in found["backends"]:
        assert entry["available"] == (entry["reason"] == ""), "a refusal has a reason"
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert {"cpu", "reference"} <= set(found["ops"]["quantize"])
    text = shown(found)
    assert "reference" in text
    cuda = next(entry for entry in found["backends"] if entry["name"] == "cuda")
    assert "CUDA" in cuda["reason"] or cuda["available"]
    assert native.cuda is not None or cuda["reason"] == native.cuda_refusal


def test_self_test_covers_every_instruction_set_and_is_quick() -> None:
    extension = native.cpu_extension()
    before = extension.isa()
    result = doctor.self_test()
    assert result["passed"], result["failures"]
    assert extension.isa() == before
    sets = doctor.ISAS.index(extension.best_isa()) + 1
    assert result["cases"] == sets * len(list(doctor._cases()))
    assert result["seconds"] < 5


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One code of one kernel off by one fails the self-test and names the case."""
    from lowp.ops.library import OPS

    kernels = OPS["quantize"].kernels
    right = kernels["cpu"]

    def wrong(*args: Any) -> Any:
        codes, scale = right(*args)
        if codes.numel() and args[1] == "column":
            codes.view(-1)[-1] += 1
        return codes, scale

    monkeypatch.setitem(kernels, "cpu", wrong)
    result = doctor.self_test()
    assert not result["passed"]
    assert all("column" in failure for failure in result["failures"])
    found = {**doctor.collect(), "self_test": result}
    assert "self-test FAILED" in shown(found)
    monkeypatch.setitem(kernels, "cpu", lambda *args: 1 / 0)
    assert "ZeroDivisionError" in doctor.self_test()["failures"][0]


def _package_without_kernels(folder: Path) -> Path:
    source = Path(lowp.__file__).parent
    ignored = shutil.ignore_patterns("_cpu*", "_cuda*", "__pycache__", "_build.json")
    shutil.copytree(source, folder / "lowp", ignore=ignored)
    return folder


def doctor_of(folder: Path) -> subprocess.CompletedProcess[str]:
    """Of the copy in a folder; an editable install's import hook would give it its kernels."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LOWP_")}
    run = ("import runpy, sys; "
           "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
           "sys.argv[1:] = ['doctor', '--json']; runpy.run_module('lowp', run_name='__main__')")
    return subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True,
        cwd=folder, env={**environment, "PYTHONPATH": str(folder)}, timeout=120)


def test_no_kernels(tmp_path: Path) -> None:
    done = doctor_of(_package_without_kernels(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["native"]["loaded"]
    assert "not built" in found["native"]["reason"]
    cpu = next(entry for entry in found["backends"] if entry["name"] == "cpu")
    assert cpu["reason"] == found["native"]["reason"]
    assert found["self_test"]["backend"] == "reference"
    assert "not built" in done.stderr, "an import without kernels says so"


def test_a_broken_extension_shows_the_loaders_error(tmp_path: Path) -> None:
    folder = _package_without_kernels(tmp_path)
    name = Path(native.cpu_extension().__file__ or "").name
    (folder / "lowp" / name).write_bytes(b"\x7fELF and no more")
    done = doctor_of(folder)
    assert done.returncode == 0, done.stderr
    reason = json.loads(done.stdout)["native"]["reason"]
    assert "failed to load" in reason
    assert name in reason, "the loader names the file"
