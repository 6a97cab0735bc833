"""Checkpoints that a crash, a full disk or a forged file cannot turn into a lost run.

A checkpoint is a directory ``step-00000100`` of three files: ``tensors.safetensors``,
``state.json`` (everything that is not a tensor) and ``manifest.json`` (size and SHA-256 of the
other two). It is written beside its final place, synced to disk, and appears by one rename, so a
directory of that name is whole. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_MAX_JSON = 1 << 30  # bytes; a forged size must not exhaust memory


class CheckpointError(RuntimeError):
    """A checkpoint is missing, half-written, damaged or not one of ours; the message says which."""


class Restored(NamedTuple):
    """What :func:`restore` read: the state as it was given to :func:`save`, and where it lay."""

    state: dict[str, Any]
    step: int
    path: Path


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree of dicts, lists, tuples, numbers, strings and tensors as plain JSON and named tensors.

    Floats keep their bits: JSON holds Python's shortest exact repr, and ``inf`` and ``nan`` are
    spelled out. Keys that are not strings, tuples and tensors become objects with one ``$`` key.

    Raises:
        TypeError: a value of another type; the message gives its path in the tree.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            name = path or "tensor"
            while name in tensors:
                name += "'"
            tensors[name] = value.detach()
            return {"$tensor": name}
        if type(value) is list:
            return [walk(v, f"{path}/{i}") for i, v in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": [walk(v, f"{path}/{i}") for i, v in enumerate(value)]}
        if isinstance(value, dict):
            items = [(k, walk(v, f"{path}/{k}" if path else str(k))) for k, v in value.items()]
            if all(type(k) is str and not k.startswith("$") for k, _ in items):
                return dict(items)
            return {"$dict": [[walk(k, f"{path}/key"), v] for k, v in items]}
        raise TypeError(
            f"lowp.hybrid.checkpoint: {path or 'the state'} must be a tensor, a number, a string, "
            f"None or a dict, list or tuple of them, got {type(value).__name__}"
        )

    return walk(state, ""), tensors


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        CheckpointError: a tensor is missing, or an unknown ``$`` key.
    """
    if isinstance(packed, list):
        return [unpack(v, tensors) for v in packed]
    if not isinstance(packed, dict):
        return packed
    tag = next(iter(packed), "")
    if len(packed) != 1 or not tag.startswith("$"):
        return {k: unpack(v, tensors) for k, v in packed.items()}
    value = packed[tag]
    if tag == "$float":
        return float(value)
    if tag == "$tuple":
        return tuple(unpack(v, tensors) for v in value)
    if tag == "$dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in value}
    if tag == "$tensor" and value in tensors:
        return tensors[value]
    raise CheckpointError(f"{STATE} refers to {tag} {value!r}, which the checkpoint does not have")


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and none sharing memory with another, as safetensors asks."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"lowp.hybrid.checkpoint: {name} must be a dense tensor")
        plain = tensor.cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        if memory in seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def sync(path: Path) -> None:
    """Put a file's or directory's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left):]
    finally:
        os.close(descriptor)
    sync(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def checkpoints(root: Path) -> list[Path]:
    """Every directory under ``root`` that is named as a checkpoint, newest first; none is read."""
    found = [path for path in (root.iterdir() if root.is_dir() else ())
             if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), _revision(path)), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise CheckpointError(f"{path} is not named as a checkpoint is, such as step-00000100")
    return int(match[1])


def _revision(path: Path) -> int:
    """How many checkpoints of its step were written before it, by its name."""
    return int(path.suffix[1:] or 0)


def save(root: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint so that whatever fails on the way, those already there stay as they were.

    Everything is written into a directory beside, each file and the directory are synced, the
    directory is renamed into place and the rename is synced. Only then are older ones removed.

    Args:
        root: directory of the run's checkpoints; made if missing.
        step: applied training steps, the checkpoint's name.
        state: what :func:`pack` takes.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The new checkpoint's directory.

    Raises:
        OSError: the disk is full or failing. TypeError: ``state`` holds what cannot be stored.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"lowp.hybrid.checkpoint.save: expected keep >= 1 and step >= 0, "
                         f"got {keep} and {step}")
    packed, tensors = pack(state)
    content, stored = _json(packed), storable(tensors)
    root.mkdir(parents=True, exist_ok=True)
    target = _free_name(root, step)
    fresh = root / f".writing-{target.name}-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        try:
            save_file(stored, fresh / TENSORS)
        except SafetensorError as error:
            raise OSError(f"writing {fresh / TENSORS} failed: {error}") from error
        sync(fresh / TENSORS)
        _write(fresh / STATE, content)
        files = {
            name: {"bytes": (fresh / name).stat().st_size, "sha256": _digest(fresh / name)}
            for name in (STATE, TENSORS)
        }
        _write(fresh / MANIFEST, _json({"format": FORMAT, "step": step, "files": files}))
        sync(fresh)
        os.rename(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync(root)
    _prune(root, step, keep)
    return target


def _free_name(root: Path, step: int) -> Path:
    """The name after the newest of that step, which is put out of the way if it is damaged.

    Never a name below it, though free: the new checkpoint would pass for the older one.
    """
    newest = next((path for path in checkpoints(root) if step_of(path) == step), None)
    if newest is None:
        return root / f"step-{step:08d}"
    try:
        verify(newest)
    except CheckpointError:
        aside = root / f".damaged-{newest.name}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(newest, aside)
        return newest
    return root / f"step-{step:08d}.{_revision(newest) + 1}"


def _prune(root: Path, step: int, keep: int) -> None:
    """Remove what is older than the last ``keep``, and what unfinished writes left behind."""
    old = [path for path in checkpoints(root) if step_of(path) <= step][keep:]
    left = [path for path in root.iterdir() if path.name.startswith((".writing-", ".damaged-"))]
    for path in [*old, *left]:
        if path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _regular(path: Path) -> os.stat_result:
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, not a link or a directory")
    return status


def _read_json(path: Path) -> Any:
    if _regular(path).st_size > _MAX_JSON:
        raise CheckpointError(f"{path} is larger than {_MAX_JSON} bytes")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def verify(path: Path) -> int:
    """Check that a checkpoint is whole, by size and SHA-256 of its files.

    Returns:
        Its step.

    Raises:
        CheckpointError: what is wrong, naming the file.
    """
    step = step_of(path)
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} must be a directory, not a link or a file")
    manifest = _read_json(path / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not a manifest of format {FORMAT}")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or len(Path(name).parts) != 1:
            raise CheckpointError(f"{path / MANIFEST} names {name!r}, a path out of the checkpoint")
    if set(files) != {STATE, TENSORS}:
        raise CheckpointError(f"{path / MANIFEST} must name {STATE} and {TENSORS}, "
                              f"got {', '.join(sorted(files)) or 'nothing'}")
    if manifest.get("step") != step:
        raise CheckpointError(f"{path / MANIFEST} is of step {manifest.get('step')!r}")
    for name, expected in files.items():
        size = _regular(path / name).st_size
        if not isinstance(expected, dict) or size != expected.get("bytes"):
            raise CheckpointError(f"{path / name} is cut short or changed: it has {size} bytes")
        if _digest(path / name) != expected.get("sha256"):
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the manifest's")
    return step


def load(path: Path) -> dict[str, Any]:
    """The state of one checkpoint, every tensor with the dtype and bits it had.

    Raises:
        CheckpointError: it is not whole; see :func:`verify`.
    """
    verify(path)
    try:
        tensors = load_file(path / TENSORS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / TENSORS} is not readable: {error}") from error
    try:
        state = unpack(_read_json(path / STATE), tensors)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE} is not a state: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} must hold an object")
    return state


def _skip(path: Path, error: CheckpointError) -> None:
    warnings.warn(f"checkpoint {path.name} is skipped, an older one is used: {error}",
                  RuntimeWarning, stacklevel=3)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint under ``root``, or ``None``; warns of each damaged newer one."""
    for path in checkpoints(root):
        try:
            verify(path)
        except CheckpointError as error:
            _skip(path, error)
        else:
            return path
    return None


def restore(root: Path) -> Restored:
    """Read the newest whole checkpoint under ``root``; warns of each damaged newer one.

    Raises:
        CheckpointError: there is none; the message says why each was refused.
    """
    refused = []
    for path in checkpoints(root):
        try:
            return Restored(load(path), step_of(path), path)
        except CheckpointError as error:
            _skip(path, error)
            refused.append(str(error))
    raise CheckpointError("; ".join([f"{root} holds no whole checkpoint", *refused]))
