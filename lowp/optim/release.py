"""Gradient release: each parameter is updated inside the backward pass and its gradient freed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowp.optim.optimizer import Optimizer


class GradientRelease:
    """Updates a parameter as soon as its gradient is complete, so that gradients never coexist.

    Lv et al., "Full parameter fine-tuning for large language models with limited resources" (LOMO),
    ACL 2024, section 3.1. The bits are those of an ordinary step, since draws and step counts
    belong to the parameter::

        release = lowp.optim.GradientRelease(optimizer)
        for batch in batches:
            loss(model, batch).backward()   # updates the weights too
            optimizer.step()                # nothing is left to update: moves hooks and the clock
            scheduler.step()

    Every backward pass is a step: gradients of several cannot be accumulated, and what needs all
    gradients at once, clipping by the norm and gradient scalers, cannot be used.
    On Linux set MALLOC_MMAP_THRESHOLD_=131072 where most gradients are below 32 MB: glibc keeps the
    holes that they leave otherwise (benchmarks/optimizer_memory.py).

    Args:
        optimizer: of ``lowp.optim``, without ``clip_grad_norm``.

    Raises:
        TypeError: another optimizer. ValueError: it clips gradients.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "lowp.optim.GradientRelease: optimizer must be one of lowp.optim, got "
                f"{type(optimizer).__name__}"
            )
        if optimizer.defaults["clip_grad_norm"] is not None:
            raise ValueError(
                "lowp.optim.GradientRelease: clip_grad_norm needs all gradients at once, which "
                "gradient release never has; set it to None"
            )
        self.optimizer = optimizer
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(self._update)
            for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]

    def remove(self) -> None:
        """Leave gradients to ``optimizer.step()`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _update(self, p: Tensor) -> None:
        self.optimizer.step_parameter(p)
        p.grad = None
