"""One command for a machine with a GPU: build, test, sanitize, time, compare the backends, and a
short table of all of it.

    python -m benchmarks.gpu                 # every phase
    python -m benchmarks.gpu test time       # some of them

Each phase ends inside 9 minutes and writes ``benchmarks/results/gpu_<phase>.json`` at once, so that
it can be run alone. Without network: set CUTLASS_PATH, and have pybind11, ninja and setuptools
installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 520  # seconds a phase may take
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def _run(command: list[str], limit: float, **environment: str) -> tuple[int, str]:
    """Exit status (124: out of time) and the end of what was printed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit,
                              env={**os.environ, **environment})
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return 124, out[-4000:]
    return done.returncode, (done.stdout + done.stderr)[-8000:]


def build() -> dict[str, Any]:
    """Both modules, in place."""
    start = time.monotonic()
    status, text = _run([sys.executable, "setup.py", "build_ext", "--inplace"], LIMIT,
                        LOWP_CUDA="1", LOWP_REQUIRE_NATIVE="1")
    doctor, found = _run([sys.executable, "-m", "lowp", "doctor", "--json"], 60)
    backends = []
    if doctor == 0 and "{" in found:
        backends = json.loads(found[found.index("{"):])["backends"]
    return {"passed": status == 0, "seconds": time.monotonic() - start, "backends": backends,
            "output": text if status else ""}


def _cases(report: Path) -> Iterator[tuple[str, str, str]]:
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome, message = child.tag, (child.get("message") or "")[:500]
        yield f"{case.get('name')}", outcome, message


def test() -> dict[str, Any]:
    """The tests that need a GPU."""
    report = RESULTS / "gpu_test.xml"
    files = [f"tests/test_{name}.py" for name in ("gpu", "far_offsets", "device_kernels")]
    status, text = _run([sys.executable, "-m", "pytest", "-m", "gpu", *files,
                         f"--junitxml={report}", "-o", "junit_family=xunit2"], LIMIT)
    cases = list(_cases(report)) if report.exists() else []
    report.unlink(missing_ok=True)
    counts = {o: sum(c[1] == o for c in cases) for o in ("passed", "failure", "error", "skipped")}
    bad = [{"test": name, "outcome": outcome, "message": message}
           for name, outcome, message in cases if outcome in ("failure", "error")]
    skipped = sorted({message for _, outcome, message in cases if outcome == "skipped"})
    return {"passed": status == 0 and counts["passed"] > 0, "counts": counts, "failures": bad,
            "skipped": skipped, "output": text[-3000:] if status else ""}


def sanitize() -> dict[str, Any]:
    """compute-sanitizer's four tools over every op on small shapes."""
    found: dict[str, Any] = {"passed": True, "tools": {}}
    for tool in TOOLS:
        status, text = _run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude",
             "kernel_substring=at::native", sys.executable, "-m", "benchmarks.gpu_small"],
            LIMIT / 4, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = re.findall(r"ERROR SUMMARY: .*", text)
        found["tools"][tool] = {"status": status, "summary": summary[-1:],
                                "output": text[-3000:] if status else ""}
        found["passed"] &= status == 0
    return found


def timing() -> dict[str, Any]:
    """Every op against its floor and its peers, in a process of its own."""
    path = RESULTS / "gpu_timing_rows.json"
    path.unlink(missing_ok=True)
    status, text = _run([sys.executable, "-m", "benchmarks.gpu_timing", str(path)], LIMIT)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    path.unlink(missing_ok=True)
    return {"passed": status == 0, **found, "output": text[-3000:] if status else ""}


def compare() -> dict[str, Any]:
    """CUDA against Triton by size, for lowp's choice on this device (lowp/measured.py)."""
    status, text = _run([sys.executable, "-m", "benchmarks.gpu_products"], LIMIT)
    return {"passed": status == 0, "output": text[-3000:]}


PHASES: dict[str, Callable[[], dict[str, Any]]] = {
    "build": build, "test": test, "sanitize": sanitize, "time": timing, "compare": compare,
}


def show() -> None:
    """What the phases left, in short."""
    for phase in PHASES:
        path = RESULTS / f"gpu_{phase}.json"
        if not path.exists():
            print(f"{phase:9} not run")
            continue
        found = json.loads(path.read_text())
        print(f"{phase:9} {'passed' if found['passed'] else 'FAILED'}", found.get("counts", ""))
        for failure in found.get("failures", [])[:10]:
            print(f"{'':9} {failure['test']}: {failure['message'].splitlines()[:1]}")
        for tool, result in found.get("tools", {}).items():
            print(f"{'':9} {tool}: {' '.join(result['summary']) or result['status']}")
        for row in found.get("rows", []):
            if "refused" in row:
                print(f"{'':9} {row['op']}: {row['refused']}")
                continue
            peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
            print(f"{'':9} {row['op']:46} {row['microseconds']:9.1f} us  "
                  f"{row['of floor']:5.0%} of its floor  {peers}")


def main() -> None:
    """Run the phases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="*", metavar="phase", help=", ".join(PHASES))
    chosen = parser.parse_args().phases or list(PHASES)
    for phase in chosen:
        if phase not in PHASES:
            parser.error(f"phase: expected some of {', '.join(PHASES)}, got {phase!r}")
    RESULTS.mkdir(exist_ok=True)
    failed = False
    for phase in chosen:
        start = time.monotonic()
        found = PHASES[phase]()
        found["wall seconds"] = round(time.monotonic() - start, 1)
        (RESULTS / f"gpu_{phase}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{phase}: {'passed' if found['passed'] else 'FAILED'}, {found['wall seconds']} s",
              flush=True)
        failed |= not found["passed"]
    show()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
