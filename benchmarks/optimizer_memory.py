"""Memory of a training process by what its weights, gradients and optimizer states are stored in.

    python -m benchmarks.optimizer_memory

Every arm is a process of its own. What the kernel says that it held (/proc/self/status: VmHWM at
most, VmRSS after the last step) is compared with a process that does the same with one small layer,
so that libraries are no part of the difference. Beside it stands what the tensors add up to. The
arm of torch has torch's layers, the others lowp's: a bf16 product of torch needs an fp32 layer more
for a while where the CPU has no instruction for it. glibc maps tensors of 32 MB, as layers 4096
wide have them, one by one; of smaller ones it keeps the holes, unless MALLOC_MMAP_THRESHOLD_ is
set. Writes ``results/optimizer_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lowp
from benchmarks.measure import record

SIZES = ((32, 4096), (32, 1024))  # layers, and how wide they are
STEPS = 3
ROOT = Path(__file__).resolve().parents[1]
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Arm(NamedTuple):
    """What one process stores."""

    weights: torch.dtype
    make: Make
    release: bool = False
    layer: type[nn.Linear] = lowp.Linear


def lowps(**options: Any) -> Make:
    """lowp's AdamW with these options."""
    return lambda model: lowp.optim.AdamW(model.named_parameters(), **options)


ARMS = {
    "fp32, torch fused AdamW": Arm(
        torch.float32, lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        layer=nn.Linear),
    "fp32, int8 states": Arm(torch.float32, lowps(state_dtype="int8")),
    "bf16, bf16 states": Arm(torch.bfloat16, lowps()),
    "bf16, bf16 states, gradient release": Arm(torch.bfloat16, lowps(), release=True),
    "bf16 and remainder, int8 states": Arm(
        torch.bfloat16, lowps(state_dtype="int8", master="remainder")),
    "bf16, int8 states": Arm(torch.bfloat16, lowps(state_dtype="int8")),
    "bf16, int8 states, gradient release": Arm(
        torch.bfloat16, lowps(state_dtype="int8"), release=True),
}


def train(arm: Arm, layers: int, width: int) -> dict[str, float]:
    """Bytes of this process, and of its tensors, over some steps of a chain of square layers."""
    shape = width, width
    chain = [arm.layer(*shape, bias=False, dtype=arm.weights) for _ in range(layers)]
    model = nn.Sequential(*chain)
    optimizer = arm.make(model)
    if arm.release:
        assert isinstance(optimizer, lowp.optim.optimizer.Optimizer)
        lowp.optim.GradientRelease(optimizer)
    for _ in range(STEPS):
        model(torch.ones(1, width, dtype=arm.weights)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    params = list(model.parameters())
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    gradients = params[:1] if arm.release else params
    return {"computed": float(sum(t.nbytes for t in [*params, *gradients, *states])),
            "resident": held("VmRSS"), "peak": held("VmHWM")}


def held(field: str) -> float:
    """Bytes, by the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measured(name: str, layers: int, width: int) -> dict[str, float]:
    """:func:`train` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.optimizer_memory", "--arm", name,
               "--layers", str(layers), "--width", str(width)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row_of(name: str, layers: int, width: int) -> dict[str, Any]:
    """An arm's bytes a parameter beyond those of the process with one small layer."""
    full, small = measured(name, layers, width), measured(name, 1, 128)
    count = layers * width * width
    own = {key: (full[key] - small[key]) / count for key in full}
    return {
        "stored": name, "width": width, "parameters": count,
        "computed bytes/param": full["computed"] / count, "peak bytes/param": own["peak"],
        "resident bytes/param": own["resident"], "peak MiB of the process": full["peak"] / 2**20,
    }


def main() -> None:
    """Measure all arms and write the results, or be one arm's process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    arguments = parser.parse_args()
    if arguments.arm is not None:
        print(json.dumps(train(ARMS[arguments.arm], arguments.layers, arguments.width)))
        return
    rows = []
    for layers, width in SIZES:
        for name in ARMS:
            row = row_of(name, layers, width)
            rows.append(row)
            print(f"{width} wide, {name:36} computed {row['computed bytes/param']:6.2f}  peak "
                  f"{row['peak bytes/param']:6.2f}  resident {row['resident bytes/param']:6.2f}")
    record("optimizer_memory", rows)


if __name__ == "__main__":
    main()
