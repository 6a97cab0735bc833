"""An optimizer's state as one safetensors file: no pickle, whole tensors whatever the ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowp.optim import sharding

if TYPE_CHECKING:
    from lowp.optim.optimizer import Optimizer

_KEY = "lowp.optim"  # of the metadata: everything that is not a tensor, as JSON
FORMAT = "1"


def save_state(optimizer: Optimizer, path: str | os.PathLike[str]) -> None:
    """Write ``optimizer.state_dict()`` to ``path``; what was there stays whole until then.

    The file is written beside, synced to disk and renamed into place. Sharded states are gathered,
    so all ranks must call this; the first of them writes. Tensors are named
    ``state/<position>/<key>``.

    Args:
        optimizer: any of :mod:`lowp.optim`.
        path: of the file; its directory must exist.

    Raises:
        OSError: the disk is full or failing.
    """
    from lowp.hybrid.checkpoint import pack, storable, sync  # not at import: it imports lowp

    state = optimizer.state_dict()
    gathers = any(sharding.is_sharded(p) for g in optimizer.param_groups for p in g["params"])
    state["state"] = {
        i: {key: sharding.whole(value) for key, value in own.items()}
        for i, own in state["state"].items()
    }
    if not gathers or torch.distributed.get_rank() == 0:
        packed, tensors = pack(state)
        target = Path(path)
        # a directory, for safetensors writes a file of a name of its own beside the one asked for
        folder = target.with_name(f".writing-{target.name}-{os.getpid()}")
        fresh = folder / target.name
        try:
            folder.mkdir(exist_ok=True)
            try:
                save_file(storable(tensors), fresh,
                          {_KEY: json.dumps(packed, allow_nan=False), "format": FORMAT})
            except SafetensorError as error:
                raise OSError(f"lowp.optim.save_state: writing {fresh} failed: {error}") from error
            sync(fresh)
            os.replace(fresh, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sync(target.parent)
        for left in target.parent.iterdir():  # by a process that was killed inside a save
            if left.name.startswith(f".writing-{target.name}-"):
                shutil.rmtree(left, ignore_errors=True)
    if gathers:
        torch.distributed.barrier()  # nobody reads before it is there


def load_state(optimizer: Optimizer, path: str | os.PathLike[str]) -> None:
    """Read what :func:`save_state` wrote, on any number of ranks; each keeps its shards.

    Raises:
        ValueError: not such a file, a damaged one, or one of other parameters.
    """
    from lowp.hybrid.checkpoint import CheckpointError, unpack

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _KEY not in metadata or metadata.get("format") != FORMAT:
            raise ValueError(f"it has no {_KEY!r} of format {FORMAT} in its metadata")
        state = unpack(json.loads(metadata[_KEY]), tensors)
    except (SafetensorError, CheckpointError, ValueError, RecursionError) as error:
        raise ValueError(
            f"lowp.optim.load_state: {os.fspath(path)} must be a file of save_state: {error}"
        ) from error
    optimizer.load_state_dict(state)
