"""Which kernel runs an op, and why the others were refused."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from lowp import measured, native
from lowp.measured import Problem

BACKENDS = ("cpu", "cuda", "triton", "reference")
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # device type -> what is tried, best first
TRITON_VERSION = (3, 6)  # the oldest that the kernels are compiled with


class BackendStatus(NamedTuple):
    """Whether a backend can run here; ``reason`` says why not."""

    name: str
    available: bool
    reason: str


class BackendError(RuntimeError):
    """The backend that was asked for, or any but the reference under LOWP_STRICT=1, cannot run."""


@functools.lru_cache(maxsize=1)
def _cuda_device_reason(archs: str) -> str:
    """Why the CUDA kernels, built for ``archs``, cannot run on what torch sees."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (no NVIDIA driver, or no GPU)"
    too_old = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not (major >= 8 if "sm_80" in archs else (major, minor) == (9, 0)):
            too_old.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    if too_old:
        return f"the CUDA kernels were built for {archs}, which {', '.join(too_old)} cannot run"
    return ""


def _cuda_reason() -> str:
    if native.cuda is None:
        return native.cuda_refusal
    return _cuda_device_reason(native.cuda.archs)


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _version(package: str) -> str:
    """The installed version; empty without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _triton_reason() -> str:
    version = _version("triton")
    if not version:
        return "triton is not installed"
    if _release(version) < TRITON_VERSION:
        return f"triton {version} is older than {'.'.join(map(str, TRITON_VERSION))}"
    if interpreted():
        numpy = _version("numpy")
        if _release(version) < (3, 7) and _release(numpy) >= (2, 4):
            return f"the interpreter of triton {version} needs numpy < 2.4, not {numpy}"
        return ""
    if torch.cuda.is_available() or torch.xpu.is_available():
        return ""
    return "no GPU, and TRITON_INTERPRET=1 is not set"


def _reason(name: str) -> str:
    """Why ``name`` cannot run on this machine; empty where it can."""
    if name == "cpu":
        return native.cpu_refusal
    if name == "cuda":
        return _cuda_reason()
    if name == "triton":
        return _triton_reason()
    return ""


def status() -> list[BackendStatus]:
    """Every backend with the reason of each refusal."""
    return [BackendStatus(name, not _reason(name), _reason(name)) for name in BACKENDS]


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = _reason(name)
    if reason:
        raise BackendError(f"{source}: backend {name!r} cannot run here: {reason}")
    return name


_forced: list[str] = []
_warned: set[str] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block, forward and backward, on one backend.

    The choice holds for the whole process, as backward passes run on threads of their own.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: no such backend.
        BackendError: the backend cannot run here; the message says why.
    """
    _forced.append(_checked(name, "lowp.backend"))
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _of_environment() -> str | None:
    """What ``LOWP_BACKEND`` asks for; read once, since it takes a tenth of a small op's time."""
    name = os.environ.get("LOWP_BACKEND")
    return _checked(name, "LOWP_BACKEND") if name else None


def forced() -> str | None:
    """The backend that :func:`backend` or, read at the first op, ``LOWP_BACKEND`` asks for."""
    return _forced[-1] if _forced else _of_environment()


def runs_cpu_kernels() -> bool:
    """Whether CPU tensors go to the CPU kernels: those are there, and nothing else is asked for."""
    return not native.cpu_refusal and forced() is None


def _unfit(name: str, device: torch.device) -> str:
    """Why a backend that runs here does not take tensors on ``device``; empty where it does."""
    if name == "cpu" and device.type != "cpu":
        return f"it takes CPU tensors, not {device.type} ones"
    if name == "cuda" and device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type} ones"
    if name == "triton" and (device.type == "cpu") != interpreted():
        return ("TRITON_INTERPRET=1 interprets it, on CPU tensors alone" if interpreted() else
                "it takes CPU tensors under TRITON_INTERPRET=1 only")
    return ""


class Choice(NamedTuple):
    """The backend that runs an op, and those before it with the reason of refusal."""

    name: str
    refused: list[tuple[str, str]]


def choose(op: str, device: torch.device, has: Iterable[str],
           problem: Problem | None = None) -> Choice:
    """The backend for ``op`` on ``device`` among those that it ``has`` a kernel for: the first that
    can run it, or the one that was measured to be the fastest for a ``problem`` of this size.

    Raises:
        BackendError: what was asked for cannot run, or only the reference is left and
            ``LOWP_STRICT=1``.
    """
    implemented = tuple(has)
    wanted = forced()
    if wanted is not None:
        if wanted not in implemented:
            raise BackendError(f"lowp::{op}: no {wanted} kernel; it has {', '.join(implemented)}")
        unfit = _unfit(wanted, device)
        if unfit:
            raise BackendError(
                f"lowp::{op}: backend {wanted!r} was asked for a {device.type} tensor: {unfit}"
            )
        return Choice(wanted, [])
    refused: list[tuple[str, str]] = []
    order = ORDER.get(device.type, ("triton",))
    times = measured.times(op, device, problem)
    for name in sorted(order, key=lambda name: times.get(name, math.inf)):
        reason = _reason(name) or _unfit(name, device)
        if not reason and name not in implemented:
            reason = f"{op} has no {name} kernel"
        if not reason:
            slower = [n for n in order[: order.index(name)] if n not in dict(refused)]
            refused += [(n, f"measured slower for products like {problem}: "
                            f"{times.get(n, math.inf):.1f} us, {name} {times[name]:.1f} us")
                        for n in slower]
            return Choice(name, refused)
        refused.append((name, reason))
    return Choice("reference", refused)


def select(op: str, device: torch.device, has: Iterable[str],
           problem: Problem | None = None) -> str:
    """As :func:`choose`, and a fall back to the reference is said once, or forbidden."""
    if device.type == "cpu" and "cpu" in has and runs_cpu_kernels():
        return "cpu"  # what choose would say, in a tenth of its time
    choice = choose(op, device, has, problem)
    if choice.name == "reference" and choice.refused:
        why = "; ".join(f"{name}: {reason}" for name, reason in choice.refused)
        if os.environ.get("LOWP_STRICT") == "1":
            raise BackendError(f"lowp::{op}: LOWP_STRICT=1 forbids the reference. {why}")
        if op not in _warned:
            _warned.add(op)
            warnings.warn(f"lowp::{op} runs on the slow reference. {why}", RuntimeWarning,
                          stacklevel=3)
    return choice.name
