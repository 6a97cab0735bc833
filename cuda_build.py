"""How csrc/cuda is compiled: what is needed, for which GPUs, with which commands. No torch here.

Environment
    LOWP_CUDA=1         build the CUDA kernels (default: where nvcc and a GPU are found); 0: never
    LOWP_CUDA_ARCHS     comma-separated subset of sm_80, sm_90a (default: both)
    CUDA_HOME           the CUDA toolkit, default: that of the nvcc on PATH
    CUTLASS_PATH        CUTLASS's headers, default: those of the PyPI package nvidia-cutlass
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).resolve().parent / "csrc" / "cuda"
CUTLASS = "nvidia-cutlass==4.2.0.0"
ARCHS = ("sm_80", "sm_90a")
GENCODE = {  # sm_80's PTX is for GPUs that are newer than this list
    "sm_80": "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "sm_90a": "-gencode=arch=compute_90a,code=sm_90a",
}
# The contract is bitwise: no contraction, and nvcc's defaults of IEEE division, square root and
# subnormals.
FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-math-errno",
]
JOB_MEMORY = 4 * 2**30  # bytes that one nvcc takes on CUTLASS: 3.4 GiB were seen


class CudaError(Exception):
    """The CUDA kernels cannot be built; the message says why."""


class Toolkit(NamedTuple):
    """What compiles csrc/cuda."""

    nvcc: Path
    home: Path
    cutlass: Path | None
    archs: tuple[str, ...]

    @property
    def version(self) -> str:
        """The compiler's own last line about itself."""
        done = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True)
        return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "nvcc"

    @property
    def libraries(self) -> list[Path]:
        """Where cudart_static may lie."""
        folders = ("lib64", "lib", "targets/x86_64-linux/lib")
        found = [self.home / folder for folder in folders]
        return [folder for folder in found if (folder / "libcudart_static.a").is_file()]


def archs() -> tuple[str, ...]:
    """The architectures that LOWP_CUDA_ARCHS asks for."""
    text = os.environ.get("LOWP_CUDA_ARCHS", "")
    chosen = tuple(a.strip() for a in text.split(",") if a.strip()) or ARCHS
    for arch in chosen:
        if arch not in ARCHS:
            raise CudaError(f"LOWP_CUDA_ARCHS: expected some of {', '.join(ARCHS)}, got {arch!r}")
    return chosen


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of PATH, or of the PyPI package beside this interpreter."""
    home = os.environ.get("CUDA_HOME")
    site = Path(sysconfig.get_paths()["purelib"])
    beside = sorted(site.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(on_path)] if on_path else []
    return next((path for path in [*candidates, *beside] if path.is_file()), None)


def home_of(nvcc: Path) -> Path:
    """The toolkit that an nvcc belongs to: it says so, since it may be a script elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def find_tool(name: str) -> Path | None:
    """A tool of the toolkit, of PATH, or of the PyPI packages: cuobjdump, for one."""
    nvcc, on_path = find_nvcc(), shutil.which(name)
    site = Path(sysconfig.get_paths()["purelib"])
    candidates = [home_of(nvcc) / "bin" / name] if nvcc is not None else []
    candidates += [Path(on_path)] if on_path else []
    candidates += sorted(site.glob(f"nvidia/cu*/bin/{name}"), reverse=True)
    return next((path for path in candidates if path.is_file()), None)


def gpu_is_visible() -> bool:
    """Whether the NVIDIA driver shows a device, asked without making a context."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def find_cutlass() -> Path | None:
    """The folder that holds cutlass/cutlass.h."""
    root = os.environ.get("CUTLASS_PATH")
    folders = [Path(root), Path(root) / "include"] if root else []
    spec = find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        folders.append(Path(next(iter(spec.submodule_search_locations))) / "source" / "include")
    return next((f for f in folders if (f / "cutlass" / "cutlass.h").is_file()), None)


def refusal() -> str:
    """Why the CUDA kernels are not to be built here; empty if they are."""
    asked = os.environ.get("LOWP_CUDA", "")
    if asked == "0":
        return "LOWP_CUDA=0"
    if asked == "1":
        return ""
    if find_nvcc() is None:
        return "nvcc was not found at install"
    if gpu_is_visible():
        return ""
    return "no NVIDIA GPU was visible at install; LOWP_CUDA=1 builds anyway"


def requirements() -> list[str]:
    """What the build takes from PyPI, besides what every build does."""
    if refusal() or os.environ.get("CUTLASS_PATH"):
        return []
    try:
        return [CUTLASS] if "sm_90a" in archs() else []
    except CudaError:  # said by the build itself, which leaves the CPU kernels working
        return []


def find_toolkit() -> Toolkit:
    """Everything the build needs.

    Raises:
        CudaError: something is missing.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaError("nvcc was not found: put it on PATH or set CUDA_HOME")
    chosen, cutlass = archs(), find_cutlass()
    if "sm_90a" in chosen and cutlass is None:
        raise CudaError(
            f"CUTLASS's headers were not found: pip install {CUTLASS}, or set CUTLASS_PATH"
        )
    toolkit = Toolkit(nvcc, home_of(nvcc), cutlass, chosen)
    if not toolkit.libraries:
        raise CudaError(f"libcudart_static.a was not found under {toolkit.home}")
    return toolkit


def archs_of(source: Path, chosen: Iterable[str]) -> list[str]:
    """The architectures that a source is compiled for: those of wgmma are for sm_90a alone."""
    only = source.stem.startswith("wgmma_")
    return [arch for arch in chosen if arch == "sm_90a" or not only]


def compile_flags(source: Path, toolkit: Toolkit, chosen: Iterable[str]) -> list[str]:
    """Flags of one source for some architectures."""
    flags = [*FLAGS, *[GENCODE[arch] for arch in chosen], f"-I{CUDA.parent}"]
    if "sm_90a" in toolkit.archs:
        flags.append("-DLOWP_SM90A")
    return [*flags, f"-I{toolkit.cutlass}"] if source.stem.startswith("wgmma_") else flags


def sources(toolkit: Toolkit) -> list[Path]:
    """What there is to compile, the longest first."""
    found = sorted(CUDA.glob("*.cu"), key=lambda s: (not s.stem.startswith("wgmma_"), s.stem))
    return [s for s in found if archs_of(s, toolkit.archs)]


def jobs() -> int:
    """Compilers at a time that the machine has processors and memory for."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    memory = int(available[1]) * 1024 if available else JOB_MEMORY
    return max(1, min(os.cpu_count() or 1, memory // JOB_MEMORY))


def ninja_file(toolkit: Toolkit, target: Path, compiler: str, includes: list[str],
               source_hash: str) -> str:
    """The build of the module ``target``; ``includes`` are those of Python and pybind11."""

    def quoted(path: str | Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    about = [f"-DLOWP_SOURCE_HASH='\"{source_hash}\"'", f"-DLOWP_COMPILER='\"{toolkit.version}\"'",
             f"-DLOWP_ARCHS='\"{','.join(toolkit.archs)}\"'", "-DLOWP_MODULE=_cuda"]
    libraries = " ".join(f"-L{quoted(d)}" for d in toolkit.libraries)
    lines = [
        "pool nvcc",
        f"  depth = {jobs()}",
        "rule device",
        f"  command = {quoted(toolkit.nvcc)} -ccbin {compiler} $flags -MD -MF $out.d -c $in "
        "-o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  pool = nvcc",
        "rule host",
        f"  command = {compiler} -std=c++17 -O2 -DNDEBUG -fPIC -fvisibility=hidden "
        + " ".join([*about, *[f"-I{quoted(i)}" for i in [CUDA.parent, *includes]]])
        + " -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {compiler} -shared -s $in {libraries} -lcudart_static -ldl -lrt -lpthread "
        "-o $out",
        f"build bindings.o: host {quoted(CUDA / 'bindings.cpp')}",
    ]
    objects = ["bindings.o"]
    for source in sources(toolkit):
        flags = compile_flags(source, toolkit, archs_of(source, toolkit.archs))
        objects.append(f"{source.stem}.o")
        lines += [f"build {source.stem}.o: device {quoted(source)}",
                  f"  flags = {' '.join(map(quoted, flags))}"]
    lines += [f"build {quoted(target)}: link {' '.join(objects)}", f"default {quoted(target)}"]
    return "\n".join(lines) + "\n"
