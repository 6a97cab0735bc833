"""Cases that run on several ranks: real processes under torchrun, with gloo and a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
Case = Callable[[Path], None]


def launch(module: str, ranks: int, folder: Path, seconds: int = 600) -> dict[str, str]:
    """Run a module's cases on ``ranks`` processes; what each said, empty where it passed.

    The first failure ends all; cases behind it are missing.

    ``--standalone`` lets the agent take a free port itself, so launches beside one another do not
    meet.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), "-m", module, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{ranks} ranks took over {seconds} s:\n{output[-4000:]}") from None
    said: dict[str, str] = {}
    for result in folder.glob(f"rank*of{ranks}.json"):
        for case, message in json.loads(result.read_text()).items():
            said[case] = said.get(case, "") + message
    assert process.returncode == 0 or any(said.values()), output[-4000:]
    return said


def main(cases: dict[str, tuple[tuple[int, ...], Case]]) -> None:
    """In every process: run the cases for this number of ranks, and write what they said."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = Path(sys.argv[1])
    said = {}
    for name, (worlds, case) in cases.items():
        if ranks not in worlds:
            continue
        torch.manual_seed(0)
        try:
            case(folder)
            said[name] = ""
        except Exception:
            said[name] = f"rank {rank}: {traceback.format_exc()}"
        (folder / f"rank{rank}of{ranks}.json").write_text(json.dumps(said))
        if said[name]:  # the others may wait for this rank: the agent ends them
            os._exit(1)
        dist.barrier()
    dist.destroy_process_group()
