"""Which random bits a stochastic rounding uses: a key, and the clock that moves it step by step.

Bits come from Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11)
under (seed, step, tensor, role, element), so a run repeats itself on any device, thread count or
number of ranks, and torch's own generators are never touched.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class Role(IntEnum):
    """What a draw is for; two roles never share bits."""

    WEIGHT = 0
    EXP_AVG = 1
    EXP_AVG_SQ = 2
    OTHER_STATE = 3
    X_CODES = 4
    WEIGHT_CODES = 5
    GRAD_CODES_DGRAD = 6
    GRAD_CODES_WGRAD = 7
    ACCUMULATED_GRAD = 8
    DROPOUT = 16
    AUGMENTATION = 17
    MASKING = 18
    SAMPLING = 19
    PROJECTION = 20


class Key(NamedTuple):
    """The random bits of one tensor at one step.

    Attributes:
        seed: 64-bit seed of the run.
        step: applied optimizer updates, 1 at the first; ``None`` reads :data:`clock`.
        tensor: crc32 of the tensor's qualified name when names are known, else its position.
        role: what the bits are for, a :class:`Role`.
    """

    seed: int = 0
    step: int | None = None
    tensor: int = 0
    role: int = Role.X_CODES


def tensor_id(name: str) -> int:
    """The 32-bit ``tensor`` of a qualified parameter or layer name: its crc32."""
    return zlib.crc32(name.encode())


def _reads_there(device: torch.device) -> bool:
    """Whether kernels on ``device`` read the step from its memory."""
    return device.type == "cuda"


def _stream_on(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph instead of running."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _capturing_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Clock:
    """The step that stochastic layers draw for: 1 + the number of optimizer updates applied.

    ``step`` is a 0-dim int64 CPU tensor, replaced and never written into, so what a forward pass
    saved stays what it was. It advances after ``optimizer.step()`` of any torch optimizer, but not
    if that could not change a parameter (:func:`is_idle`) or a gradient scaler skipped it.
    With several optimizers a training step, the clock advances once for each.

    Kernels on a CUDA device read the step there (:meth:`on`), so a CUDA graph draws afresh in every
    replay, whether the optimizer's step is a part of the graph or not. Once a graph counts updates,
    the count on its device is the true one: ``step`` is then read from there, and waits for it.
    """

    def __init__(self) -> None:
        self._step: Tensor = torch.ones((), dtype=torch.int64)
        self._copies: dict[tuple[torch.device, int], Tensor] = {}  # of the step, a stream each
        self._counters: dict[torch.device, Tensor] = {}  # what graphs read; written in place
        self._leader: Tensor | None = None  # the counter that a captured update advances
        self._holds = 0

    @property
    def step(self) -> Tensor:
        """The step of the next update; set, the devices follow."""
        if self._leader is not None and not is_capturing():
            now = int(self._leader)
            if now != int(self._step):
                self._replace(torch.tensor(now, dtype=torch.int64))
        return self._step

    @step.setter
    def step(self, step: Tensor) -> None:
        self._replace(step)
        self._leader = None
        for counter in self._counters.values():
            counter.fill_(int(step))

    def _replace(self, step: Tensor) -> None:
        self._step = step
        self._copies.clear()

    def set(self, step: int) -> None:
        """Set the step, as a resume does; the first is 1."""
        if step < 1:
            raise ValueError(f"lowp.key.clock.set: step must be at least 1, got {step}")
        self.step = torch.tensor(step, dtype=torch.int64)

    def on(self, device: torch.device) -> Tensor:
        """The step as a kernel on ``device`` takes it.

        A CUDA device has a tensor of its own: while a graph is captured the counter that
        :meth:`advance` writes into, else one that is never written into, as ``step`` is not.

        Raises:
            RuntimeError: a graph is captured, and no pass before it asked for the step there.
        """
        if torch.compiler.is_compiling():
            return self._step
        if not _reads_there(device):
            return self.step
        if is_capturing():
            if device not in self._counters:
                raise RuntimeError(
                    "lowp.key.clock: a CUDA graph captures stochastic rounding on "
                    f"{device} before any ran there; run a warm-up pass first"
                )
            return self._counters[device]
        now = self.step
        if torch._C._len_torch_dispatch_stack():  # under a mode a tensor may only pretend to be one
            return now
        place = device, _stream_on(device)
        copy = self._copies.get(place)
        if copy is None:
            self._copies[place] = copy = torch.full_like(now, int(now), device=device)
            if device not in self._counters:
                self._counters[device] = copy.clone()
        return copy

    def advance(self, found_inf: Tensor | None = None) -> None:
        """One update was applied, unless ``found_inf`` is not 0; a captured one counts when its
        graph is replayed."""
        if self._holds:
            return
        if is_capturing():
            counter = self._counters.get(_capturing_device())
            if counter is not None:
                counter.add_(1 if found_inf is None else (found_inf == 0).all())
                self._leader = counter
            return
        if found_inf is None or not found_inf.item():
            self._replace(self.step + 1)
            for counter in self._counters.values():
                counter.add_(1)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, updates are not counted: they are parts of one that is."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1


clock = Clock()


def is_idle(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all learning rates and all gradients of a step are 0.

    torch.distributed.checkpoint takes such steps to make states, with each save of an optimizer
    that has none. Rates on an accelerator count as not 0, for reading them would wait for it. Of
    sharded gradients all ranks find the same.
    """
    for group in optimizer.param_groups:
        lr = group.get("lr", 1.0)
        if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0:
            return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return bool(grads) and all(g.layout == torch.strided and not _nonzero(g) for g in grads)


def _nonzero(grad: Any) -> int:
    count: Any = torch.count_nonzero(grad)
    return int(count.full_tensor() if hasattr(count, "full_tensor") else count)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    applied = getattr(optimizer, "applied", None)  # lowp.optim's know
    if applied is None:
        unseen = torch.compiler.is_compiling() or is_capturing()
        applied = unseen or not is_idle(optimizer)
    elif not applied:
        optimizer.applied = True
    if applied:
        clock.advance(getattr(optimizer, "found_inf", None))  # which a gradient scaler sets


register_optimizer_step_post_hook(_after_step)
