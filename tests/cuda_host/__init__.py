"""The CUDA kernels that are bodies for host and device, built without CUDA."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BODIES = ("accumulate", "activation_grad", "adafactor", "adamw", "bias_grad", "dequantize",
          "linear_epilogue", "lion", "muon", "quantize", "sgd", "square_sums", "transpose_codes",
          "upload")
"""Kernels of csrc/cuda that need no instruction of a GPU; the products' sums are this folder's."""

FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wno-unknown-pragmas", "-DLOWP_HOST_BUILD", "-DLOWP_MODULE=_cuda_host",
    '-DLOWP_COMPILER="host"', '-DLOWP_ARCHS="host"', '-DLOWP_SOURCE_HASH=""',
]


def build(folder: Path, compiler: str = "c++") -> ModuleType:
    """Compile into ``folder`` and import the module; it has ``lowp._cuda``'s entries."""
    sources = [CSRC / "cuda" / f"{name}.cu" for name in BODIES]
    sources += [CSRC / "cuda" / "bindings.cpp", Path(__file__).with_name("products.cpp")]
    include = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, *include, "-x", "c++", "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_cuda_host", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
