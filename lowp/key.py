"""Which random bits a stochastic rounding uses: a key, and the clock that moves it step by step.

Bits come from Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11)
under (seed, step, tensor, role, element), so a run repeats itself on any device, thread count or
number of ranks, and torch's own generators are never touched.
"""

from __future__ import annotations

import zlib
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


class Clock:
    """The step that stochastic layers draw for: 1 + the number of optimizer updates applied.

    ``step`` is a 0-dim int64 CPU tensor, replaced and never written into, so what a forward pass
    saved stays what it was. It advances after ``optimizer.step()`` of any torch optimizer, but not
    if that could not change a parameter (:func:`is_idle`) or a gradient scaler skipped it.
    With several optimizers a training step, the clock advances once for each.
    """

    def __init__(self) -> None:
        self.step: Tensor = torch.ones((), dtype=torch.int64)

    def set(self, step: int) -> None:
        """Set the step, as a resume does; the first is 1."""
        if step < 1:
            raise ValueError(f"lowp.key.clock.set: step must be at least 1, got {step}")
        self.step = torch.tensor(step, dtype=torch.int64)

    def advance(self) -> None:
        """One update was applied."""
        self.step = self.step + 1


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
    found_inf = getattr(optimizer, "found_inf", None)  # a gradient scaler sets it for the step
    if found_inf is not None and found_inf.item():
        return
    applied = getattr(optimizer, "applied", None)  # lowp.optim's know
    if applied is None:
        applied = torch.compiler.is_compiling() or not is_idle(optimizer)
    elif not applied:
        optimizer.applied = True
    if applied:
        clock.advance()


register_optimizer_step_post_hook(_after_step)
