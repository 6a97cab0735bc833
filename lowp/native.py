"""Loads the compiled kernels, CPU and CUDA, and says why when there are none."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # loads torch's OpenMP runtime first, which the kernels then share

_PACKAGE = Path(__file__).resolve().parent


def source_hash(csrc: Path) -> str:
    """The hash that setup.py embeds, of the sources as they are now."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(csrc).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _recorded(key: str) -> str:
    """What the install wrote down about a module that it did not build."""
    record = _PACKAGE / "_build.json"
    return str(json.loads(record.read_text()).get(key) or "") if record.exists() else ""


def _why_no_cpu() -> str:
    reason = _recorded("reason")
    if reason:
        return f"the native kernels were not built at install: {reason}"
    return "the native kernels were not built: no lowp/_cpu extension is installed"


def _why_no_cuda() -> str:
    return _recorded("cuda_reason") or "lowp was built without CUDA kernels"


def _load(name: str, label: str, why_absent: Callable[[], str]) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(f"lowp.{name}")
    except ModuleNotFoundError:
        return None, why_absent()
    except Exception as error:  # a loader error, whatever it is, must not break `import lowp`
        return None, f"the {label} kernels failed to load (torch {torch.__version__}): {error}"
    csrc = _PACKAGE.parent / "csrc"
    if csrc.is_dir() and module.source_hash != source_hash(csrc):
        warnings.warn(
            f"lowp: csrc/ changed after the {label} kernels were built; "
            "run `pip install -e .` again",
            RuntimeWarning,
            stacklevel=2,
        )
    return module, ""


cpu, cpu_refusal = _load("_cpu", "native", _why_no_cpu)
"""The extension module, or ``None`` and the reason."""

cuda, cuda_refusal = _load("_cuda", "CUDA", _why_no_cuda)
"""The CUDA module, or ``None`` and the reason; it loads without a driver, and makes no context."""

if cpu is None:
    warnings.warn(
        f"lowp: {cpu_refusal}. Ops run on the slow reference.", RuntimeWarning, stacklevel=2
    )


def cpu_extension() -> ModuleType:
    """The extension module; a kernel that runs has it."""
    if cpu is None:
        raise RuntimeError(f"lowp: {cpu_refusal}")
    return cpu


def cuda_extension() -> ModuleType:
    """The CUDA module; a kernel that runs has it."""
    if cuda is None:
        raise RuntimeError(f"lowp: {cuda_refusal}")
    return cuda


def cuda_place(x: torch.Tensor) -> Any:
    """Where the CUDA kernels for ``x`` run: its device, and torch's current stream there.

    A CPU tensor is one of the tests' host build of the same kernels, which knows neither.
    """
    if x.device.type != "cuda":
        return cuda_extension().Place(0, 0)
    stream = torch.cuda.current_stream(x.device)
    return cuda_extension().Place(stream.device_index, stream.cuda_stream)
