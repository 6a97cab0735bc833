"""What every Triton kernel becomes on GPUs that need not be here: registers, spills, instructions.

    python -m benchmarks.compiled           writes results/triton_compiled.json
    python -m benchmarks.compiled --json    prints what it would write

Each case runs an op's launcher while its launches are recorded instead of run, so what is compiled
is what a GPU would get: the same constants, the divisibility of these very shapes and pointers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import triton
from lowp.kernels.launch import Launch, recorded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import compiled_cases
from benchmarks.triton_ir import narrow_products

RESULT = Path(__file__).resolve().parent / "results" / "triton_compiled.json"
KERNELS = Path(compiled_cases.__file__).resolve().parent.parent / "kernels"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).resolve().parent / "backends" / "nvidia" / "bin"

SASS = {  # what is counted, by the start of the instruction
    "HMMA": r"HMMA\.", "IMMA": r"IMMA\.", "HGMMA": r"HGMMA\.", "IGMMA": r"IGMMA\.",
    "UTCMMA": r"UTC[A-Z]*MMA", "TMA load": r"UTMALDG", "TMA store": r"UTMASTG",
    "load 128": r"(LDG|LDGSTS)\.\S*128", "load": r"(LDG|LDGSTS)\.", "store 128": r"STG\.\S*128",
    "store": r"STG\.", "local": r"(LDL|STL)\b",
}
AMDGCN = {
    "MFMA": r"v_mfma_", "load 128": r"(global|buffer)_load_dwordx4",
    "load": r"(global|buffer)_load_", "store 128": r"(global|buffer)_store_dwordx4",
    "store": r"(global|buffer)_store_", "local": r"scratch_(load|store)",
}


class Binding(NamedTuple):
    """A launch as Triton sees it: what tells one compiled kernel from another."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    key: str


def bind(launch: Launch, target: GPUTarget) -> Binding:
    """The specialization of a recorded launch on ``target``."""
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **launch.options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return Binding(signature, constants, attributes, parsed, f"{specialization}{options}")


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel, without a GPU."""
    binding = bind(launch, target)
    source = ASTSource(launch.kernel, binding.signature, binding.constants, binding.attributes)
    return triton.compile(source, target=target, options=binding.options.__dict__)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(NVIDIA_TOOLS / name), *arguments], capture_output=True, text=True,
                          check=True)
    return done.stdout


def _nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "spill bytes": int(stack), **_counts(sass, SASS)}


def _amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    return {"registers": numbers["vgpr_count"],
            "spill bytes": numbers["private_segment_fixed_size"], **_counts(text, AMDGCN)}


def _counts(text: str, patterns: dict[str, str]) -> dict[str, int]:
    counts = Counter({name: len(re.findall(rf"\s{pattern}", text))
                      for name, pattern in patterns.items()})
    return {name: count for name, count in counts.items() if count}


def rows_of(case: str, target: str) -> list[dict[str, Any]]:
    """One row for each kernel that ``case`` launches on ``target``."""
    gpu = TARGETS[target]
    with recorded(gpu.arch if gpu.backend == "cuda" else 0) as launches:
        compiled_cases.CASES[case]()
    rows = []
    for launch in launches:
        kernel = compile_launch(launch, gpu)
        inspect = _nvidia if gpu.backend == "cuda" else _amd
        rows.append({"case": case, "target": target, "kernel": launch.kernel.fn.__name__.strip("_"),
                     "warps": launch.options.get("num_warps", 4),
                     "stages": launch.options.get("num_stages", 3),
                     "shared bytes": kernel.metadata.shared, **inspect(kernel),
                     "32-bit products in addresses": len(narrow_products(kernel.asm["ttir"]))})
    return rows


def table(jobs: int = 2) -> list[dict[str, Any]]:
    """The rows of all cases."""
    pairs = [(case, target) for case in compiled_cases.CASES for target in TARGETS
             if target == "sm_90" or case in compiled_cases.EVERYWHERE]
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(rows_of, *zip(*pairs, strict=True), chunksize=4)
    return [row for rows in found for row in rows]


def source_hash() -> str:
    """Over the kernels and the cases: tells a table that is older than they are."""
    digest = hashlib.sha256()
    for path in [*sorted(KERNELS.glob("*.py")), Path(compiled_cases.__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def keys_of(case: str, target: str, tokens: Iterable[int]) -> set[tuple[str, str]]:
    """Kernels, with what Triton tells apart, that ``case`` launches over all these token counts."""
    gpu = TARGETS[target]
    found = set()
    for count in tokens:
        with recorded(gpu.arch) as launches:
            compiled_cases.BY_TOKENS[case](count)
        found |= {(launch.kernel.fn.__name__, bind(launch, gpu).key) for launch in launches}
    return found


def main() -> int:
    """Write the table; with ``--json`` print what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the table and write nothing")
    parser.add_argument("--keys", action="store_true", help="print the kernels of 257 shapes")
    parser.add_argument("--hash", action="store_true", help="print the hash of the sources")
    options = parser.parse_args()
    if options.hash:
        print(json.dumps(source_hash()))
        return 0
    if options.keys:
        print(json.dumps({case: [name for name, _ in keys_of(case, "sm_90", range(1, 258))]
                          for case in compiled_cases.BY_TOKENS}))
        return 0
    found = {"triton": triton.__version__, "sources": source_hash(),
             "rows": table()}
    if options.json:
        print(json.dumps(found))
        return 0
    RESULT.parent.mkdir(exist_ok=True)
    rows = ",\n  ".join(json.dumps(row) for row in found.pop("rows"))
    RESULT.write_text(f"{json.dumps(found)[:-1]},\n \"rows\": [\n  {rows}\n ]}}\n")
    print(f"wrote {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
