"""What the CUDA kernels were compiled to: registers, memory and the instructions that matter, a
kernel a row.

    python -m benchmarks.cuda_compiled

builds the module for every architecture and writes ``benchmarks/results/cuda_compiled.json``. It
needs nvcc, cuobjdump and CUTLASS (the ``test`` extra has them) and no GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ninja
import pybind11

import cuda_build
from lowp.native import source_hash

RESULT = Path(__file__).resolve().parent / "results" / "cuda_compiled.json"
CSRC = cuda_build.CUDA.parent

INSTRUCTIONS = {  # column -> what it counts in the disassembly
    "HGMMA": r"\bHGMMA\.", "IGMMA": r"\bIGMMA\.", "HMMA": r"\bHMMA\.", "IMMA": r"\bIMMA\.",
    "16-byte loads": r"\b(LDG\.E(\.[A-Z0-9]+)*\.128|LDGSTS\.E(\.[A-Z0-9]+)*\.128|UTMALDG)",
    "16-byte stores": r"\bSTG\.E(\.[A-Z0-9]+)*\.128",
    "local memory": r"\b(LDL|STL)(\.|\s)",
}
ANY = re.compile(r"\b(UTMALDG|LDG|STG|LDL|STL|LDGSTS|HGMMA|IGMMA|HMMA|IMMA)\b")


def build(folder: Path) -> Path:
    """The module, compiled into ``folder`` as the install does it."""
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    toolkit = cuda_build.find_toolkit()
    compiler = os.environ.get("CXX", "c++")
    text = cuda_build.ninja_file(toolkit, target, compiler, includes, source_hash(CSRC))
    (folder / "build.ninja").write_text(text)
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        log = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"the CUDA kernels do not compile:\n{log}")
    return target


def _cuobjdump(*arguments: str | Path) -> str:
    tool = cuda_build.find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump was not found: pip install nvidia-cuda-cuobjdump")
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True,
                          env=environment)
    return done.stdout


def _short(name: str) -> str:
    """A kernel's name without what all of them share."""
    name = re.sub(r"^void |lowp::cuda::|lowp::|\(anonymous namespace\)::", "", name)
    atom = re.search(r"GMMA::MMA_(\w+)<", name) or re.search(r"GMMA::MMA_(\w+)", name)
    if atom is None:
        return re.sub(r"\(.*", "", name) if "<" not in name else name[:_end_of_template(name)]
    tile = re.search(r"WarpSpecialized(Cooperative|Pingpong)>, "
                     r"cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(\d+)>", name)
    majors = re.findall(r"GMMA::Major\)(\d)", name)
    along = "".join("K" if major == "0" else "M" for major in majors[:2]) or "KK"
    assert tile is not None, name
    sums = ", row sums" if "SummingMainLoop" in name else ""
    return f"wgmma {atom[1]} {along} {'x'.join(tile.groups()[1:])} {tile[1]}{sums}"


def _end_of_template(name: str) -> int:
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == ">" and depth == 0:
            return i + 1
    return len(name)


def _demangled(names: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                          check=True)
    return dict(zip(names, map(_short, done.stdout.splitlines()), strict=True))


def read(module: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> column -> number, of a built module."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    arch = function = ""
    for line in _cuobjdump("-res-usage", module).splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            function = found[1]
        elif "REG:" in line:
            number = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
            usage[arch, function] = {"registers": number["REG"], "stack bytes": number["STACK"],
                                     "spilled bytes": number["LOCAL"],
                                     "shared bytes": number["SHARED"]}
    counts: dict[tuple[str, str], Counter[str]] = {}
    for line in _cuobjdump("-sass", module).splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            counts[arch, found[1]] = current = Counter()
        elif ANY.search(line):
            current.update(c for c, pattern in INSTRUCTIONS.items() if re.search(pattern, line))
    names = _demangled(sorted({name for _, name in usage}))
    table: dict[str, dict[str, dict[str, int]]] = {}
    for (arch, name), row in sorted(usage.items()):
        columns = {c: counts[arch, name][c] for c in INSTRUCTIONS}
        table.setdefault(arch, {})[names[name]] = {**row, **columns}
    return {arch: dict(sorted(rows.items())) for arch, rows in table.items()}


def collect() -> dict[str, Any]:
    """Build, and read everything that the committed table holds."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = read(build(Path(folder)))
    compiler = cuda_build.find_toolkit().version
    return {"compiler": compiler, "flags": cuda_build.FLAGS, "kernels": kernels}


def record(found: dict[str, Any]) -> None:
    """Write the table, a kernel a line."""
    RESULT.parent.mkdir(exist_ok=True)
    lines = [f' "{key}": {json.dumps(value)}' for key, value in found.items() if key != "kernels"]
    archs = []
    for arch, rows in found["kernels"].items():
        inner = ",\n".join(f"   {json.dumps(k)}: {json.dumps(row)}" for k, row in rows.items())
        archs.append(f'  "{arch}": {{\n{inner}\n  }}')
    lines.append(' "kernels": {\n' + ",\n".join(archs) + "\n }")
    RESULT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Build, read and write."""
    found = collect()
    record(found)
    total = sum(map(len, found["kernels"].values()))
    sys.stdout.write(f"{total} kernels in {RESULT}\n")


if __name__ == "__main__":
    main()
