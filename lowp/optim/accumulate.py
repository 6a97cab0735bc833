"""Gradient accumulation in the parameters' type with stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowp.key import clock, tensor_id
from lowp.ops.accumulate import accumulate
from lowp.ops.library import ROUNDINGS


class GradientAccumulation:
    """Rounds what autograd adds to an existing ``.grad`` of a 16-bit parameter stochastically.

    Autograd adds the gradients of several backward passes in the parameter's type to nearest, where
    a gradient below half an ulp of the sum is lost; here it is kept in the mean
    (:data:`lowp.ops.accumulate.accumulate`), at the same 2 bytes an element. ``.grad`` stays what
    everything else expects of it: clipping, scalers and optimizers see the sum::

        accumulation = lowp.optim.GradientAccumulation(model.named_parameters())
        for step in range(steps):
            for batch in micro_batches:
                loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    The draws depend on the seed, the step (:data:`lowp.key.clock`), the parameter's name or
    position and the number of backward passes since ``.grad`` was ``None``, so a run that resumes
    between two steps repeats its bits.

    Args:
        params: parameters or (name, parameter) pairs; fp32 ones and those without gradients are
            left to autograd.
        rounding: ``"stochastic"`` or ``"nearest"``.
        seed: of the draws.

    Raises:
        ValueError: an unknown rounding.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], *,
                 rounding: str = "stochastic", seed: int = 0) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(
                "lowp.optim.GradientAccumulation: rounding must be one of "
                f"{', '.join(ROUNDINGS)}, got {rounding!r}"
            )
        self.rounding, self.seed = rounding, seed
        self._additions: dict[Tensor, int] = {}
        self._handles: list[Any] = []
        for position, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) else (None, entry)
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
                identity = position if name is None else tensor_id(name)
                self._handles.append(p.register_hook(self._hook(p, identity)))

    def remove(self) -> None:
        """Give the accumulation back to autograd."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, p: Tensor, identity: int) -> Callable[[Tensor], Tensor | None]:
        def add(grad: Tensor) -> Tensor | None:
            """Runs before autograd adds ``grad`` to ``p.grad``; hands over the sum instead."""
            total = p.grad
            if total is None or grad.is_sparse or total.is_sparse:
                self._additions[p] = 0
                return None
            self._additions[p] = addition = self._additions.get(p, 0) + 1
            with torch.no_grad():
                accumulate([total], [grad], self.rounding, self.seed, clock.on(total.device),
                           addition, [identity], [0])
            p.grad = None
            return total

        return add
