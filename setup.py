"""Builds lowp's kernels with ninja, without torch: the CPU's, each once per instruction set, and,
where nvcc and a GPU are found, the CUDA ones (cuda_build.py). A failure of one leaves the other.

Environment
    LOWP_REQUIRE_NATIVE=1   a failed native build fails the install (else: pure Python, said loudly)
    CXX                     the C++17 compiler, default: the first of c++, g++, clang++ on PATH
    LOWP_SANITIZE=LIST      the CPU kernels under GCC's or Clang's sanitizers, such as
                            address,undefined; the runtime has to be preloaded (make sanitize)
    and what cuda_build.py names
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))

import cuda_build  # noqa: E402

COMMON_FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mavx512vnni", "-mprefer-vector-width=512",
    ],
}
ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
ONLY = {"avx512_bf16": ("linear",)}  # the other kernels have nothing to gain over avx512


def sanitizer_flags() -> list[str]:
    """What instruments the CPU kernels, and makes the first finding end the process."""
    names = os.environ.get("LOWP_SANITIZE")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


def source_hash() -> str:
    """Hash over csrc/: embedded in the binary, so that a stale one can be told."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(CSRC).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in candidates:
        if shutil.which(name.split()[0]):
            return name
    raise CompileError(f"no C++ compiler found (looked for {', '.join(candidates)})")


def find_ninja() -> str:
    try:
        import ninja

        beside = Path(ninja.BIN_DIR) / "ninja"
        if beside.exists():
            return str(beside)
    except ImportError:
        pass
    on_path = shutil.which("ninja")
    if on_path is None:
        raise CompileError("ninja not found")
    return on_path


def quoted(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles csrc/ with ninja. A failure leaves a pure Python install, unless it is forbidden."""

    def run(self) -> None:
        self.recorded: dict[str, object] = {}
        self.in_source = bool(self.editable_mode or self.inplace)  # run() clears inplace
        reason = cuda_build.refusal()
        if reason:
            self.note("cuda", False, f"the CUDA kernels were not built: {reason}")
            if self.in_source:
                for stale in (ROOT / "lowp").glob("_cuda*.so"):
                    stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        is_cuda = ext.name == "lowp._cuda"
        key, label = ("cuda", "CUDA") if is_cuda else ("native", "NATIVE")
        reason = ""
        try:
            (self.compile_cuda if is_cuda else self.compile)(target)
        except Exception as error:
            target.unlink(missing_ok=True)
            reason = " ".join(str(error).split()) or type(error).__name__
            required = os.environ.get("LOWP_REQUIRE_NATIVE") == "1"
            if required and (not is_cuda or os.environ.get("LOWP_CUDA") == "1"):
                # setuptools only warns of a CompileError of an optional extension
                raise RuntimeError(
                    f"LOWP_REQUIRE_NATIVE=1 and the build failed: {reason}") from error
            rest = "" if is_cuda else ", installing pure Python"
            print(f"\n*** lowp: {label} KERNELS NOT BUILT{rest}: {reason} ***\n", file=sys.stderr,
                  flush=True)
        said = f"the CUDA kernels were not built: {reason}" if is_cuda and reason else reason
        self.note(key, not reason, said)
        self.keep_record(target.parent / "_build.json")

    def note(self, key: str, built: bool, reason: str) -> None:
        self.recorded[key] = built
        self.recorded["reason" if key == "native" else f"{key}_reason"] = reason

    def keep_record(self, record: Path) -> None:
        """An editable install reads the record from the source tree, as it does the binary."""
        record.write_text(json.dumps(self.recorded) + "\n")
        if self.in_source:
            source = ROOT / "lowp" / record.name
            if source != record:
                shutil.copyfile(record, source)

    def compile_cuda(self, target: Path) -> None:
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        toolkit = cuda_build.find_toolkit()
        text = cuda_build.ninja_file(toolkit, target, find_compiler(), includes, source_hash())
        self.run_ninja("cuda", text)

    def compile(self, target: Path) -> None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise CompileError(f"the CPU kernels are written for x86-64, not {platform.machine()}")
        if sys.platform == "win32":
            raise CompileError("the native build needs GCC or Clang, which Windows lacks")
        self.run_ninja("cpu", self.ninja_file(target))

    def run_ninja(self, folder: str, text: str) -> None:
        build = Path(self.build_temp).resolve() / folder
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(text)
        done = subprocess.run([find_ninja(), "-C", str(build)], capture_output=True, text=True)
        if done.returncode != 0:
            log = (done.stdout + done.stderr).strip()
            sys.stderr.write(log + "\n")
            first = next((line for line in log.splitlines() if "error" in line.lower()), log[-300:])
            raise CompileError(f"compilation failed: {first}")

    def ninja_file(self, target: Path) -> str:
        import pybind11

        includes = [CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
        compiler = find_compiler()
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
        name = version.stdout.splitlines()[0] if version.stdout else compiler
        lines = [
            f"cxx = {compiler}",
            f"sanitize = {' '.join(sanitizer_flags())}",
            f"flags = {' '.join(COMMON_FLAGS)} $sanitize "
            + " ".join(f"-I{quoted(i)}" for i in includes),
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = $cxx -shared -fopenmp {'$sanitize' if sanitizer_flags() else '-s'} "
            "$in -o $out",
        ]
        objects = []

        def add(source: Path, stem: str, extra: str) -> None:
            objects.append(f"{stem}.o")
            lines.append(f"build {stem}.o: compile {quoted(source)}")
            lines.append(f"  extra = {extra}")

        about = f"-DLOWP_SOURCE_HASH='\"{source_hash()}\"' -DLOWP_COMPILER='\"{name}\"'"
        add(CSRC / "bindings.cpp", "bindings", about)
        add(CSRC / "isa.cpp", "isa", "")
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for isa, isa_flags in ISA_FLAGS.items():
                if source.stem not in ONLY.get(isa, (source.stem,)):
                    continue
                extra = " ".join([f"-DLOWP_ISA={isa}", *isa_flags])
                add(source, f"{source.stem}.{isa}", extra)
        lines.append(f"build {quoted(target)}: link {' '.join(objects)}")
        lines.append(f"default {quoted(target)}")
        return "\n".join(lines) + "\n"


CUDA_MODULES = [] if cuda_build.refusal() else [Extension("lowp._cuda", sources=[], optional=True)]

setup(
    packages=[*find_packages(include=["lowp", "lowp.*"]), "lowp.kernels"],
    package_dir={"lowp": "lowp", "lowp.kernels": "kernels"},
    ext_modules=[Extension("lowp._cpu", sources=[], optional=True), *CUDA_MODULES],
    setup_requires=cuda_build.requirements(),
    cmdclass={"build_ext": NinjaBuild},
)
