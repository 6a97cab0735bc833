"""The one way in which a kernel starts: on its tensors' device, on torch's current stream.

Every launch goes through :func:`launch`, which can also record instead of run, so that what a GPU
would run can be compiled and inspected without one (benchmarks/compiled.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""Options of a kernel that keeps the contract bit for bit: a fused a*b+c has others. It is a launch
option of Triton 3.6 to 3.9, which then compile without contraction, ptxas included."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels are interpreted, on CPU tensors (``TRITON_INTERPRET=1`` before the import)."""


class Launch(NamedTuple):
    """A launch that was recorded: the kernel, its grid, arguments and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Recording(NamedTuple):
    launches: list[Launch]
    capability: int
    processors: int


_recordings: list[_Recording] = []


@contextmanager
def recorded(capability: int, processors: int = 132) -> Iterator[list[Launch]]:
    """Collects launches instead of running them, as for a GPU of ``capability`` (90: sm_90)."""
    recording = _Recording([], capability, processors)
    _recordings.append(recording)
    try:
        yield recording.launches
    finally:
        _recordings.pop()


def capability(device: torch.device) -> int:
    """10 times the compute capability of an NVIDIA GPU; 0 for other GPUs and the interpreter."""
    if _recordings:
        return _recordings[-1].capability
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return 0
    return _nvidia_capability(device)


@functools.cache
def _nvidia_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """How many programs run side by side at least: the multiprocessors; 1 when interpreted."""
    if _recordings:
        return _recordings[-1].processors
    return 1 if INTERPRETED else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel``; nothing for an empty grid. The first argument tells the device.

    Raises:
        RuntimeError: a tensor lies elsewhere.
    """
    if 0 in grid:
        return
    if _recordings:
        _recordings[-1].launches.append(Launch(kernel, grid, arguments, options))
        return
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    device = tensors[0].device
    for other in tensors:
        if other.device != device:
            raise RuntimeError(
                f"lowp.kernels: {kernel.fn.__name__}: expected all tensors on {device}, got one on "
                f"{other.device}"
            )
    if device.type == "cpu":
        with numpy.errstate(all="ignore"):  # NaN and Inf are results here
            kernel[grid](*arguments, **options)
        return
    with torch.get_device_module(device).device(device):
        kernel[grid](*arguments, **options)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


class KeyArguments(NamedTuple):
    """How a kernel takes the random bits of one tensor (csrc/numerics/philox.h: PhiloxKey)."""

    seed_low: int
    seed_high: int
    step_pointer: Tensor | None  # read on the device, so that a CUDA graph replays with fresh bits
    step: int
    tensor: int
    role: int


def key_arguments(x: Tensor, seed: int, step: Tensor | None, tensor: int,
                  role: int) -> KeyArguments:
    """The arguments for a kernel on ``x``'s device; a step elsewhere is read on the host."""
    bits = seed & (2**64 - 1)
    on_device = step is not None and step.device == x.device
    now = 1 if step is None or on_device else int(step.item())
    return KeyArguments(bits & 0xFFFFFFFF, bits >> 32, step if on_device else None, now, tensor,
                        role)


KEY = ("seed_low", "seed_high", "step", "tensor", "role", "offset")
"""Arguments whose values must not make another kernel."""
