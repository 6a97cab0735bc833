"""Loads the compiled CPU kernels, and says why when there are none."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import torch  # loads torch's OpenMP runtime first, which the kernels then share

_PACKAGE = Path(__file__).resolve().parent


def _source_hash(csrc: Path) -> str:
    """The hash that setup.py embeds, of the sources as they are now."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.relative_to(csrc).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _why_absent() -> str:
    record = _PACKAGE / "_build.json"
    if record.exists():
        reason = json.loads(record.read_text()).get("reason")
        if reason:
            return f"the native kernels were not built at install: {reason}"
    return "the native kernels were not built: no lowp/_cpu extension is installed"


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("lowp._cpu")
    except ModuleNotFoundError:
        return None, _why_absent()
    except Exception as error:  # a loader error, whatever it is, must not break `import lowp`
        return None, f"the native kernels failed to load (torch {torch.__version__}): {error}"
    csrc = _PACKAGE.parent / "csrc"
    if csrc.is_dir() and module.source_hash != _source_hash(csrc):
        warnings.warn(
            "lowp: csrc/ changed after the native kernels were built; run `pip install -e .` again",
            RuntimeWarning,
            stacklevel=2,
        )
    return module, ""


cpu, cpu_refusal = _load()
"""The extension module, or ``None`` and the reason."""

if cpu is None:
    warnings.warn(
        f"lowp: {cpu_refusal}. Ops run on the slow reference.", RuntimeWarning, stacklevel=2
    )


def cpu_extension() -> ModuleType:
    """The extension module; a kernel that runs has it."""
    if cpu is None:
        raise RuntimeError(f"lowp: {cpu_refusal}")
    return cpu
