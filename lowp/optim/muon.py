"""Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.ops.muon import ADJUSTMENTS, muon
from lowp.optim.optimizer import Batch, Optimizer


class Muon(Optimizer):
    """``torch.optim.Muon`` with lowp's products and one rounding a store; for matrices alone.

    The formula and its source: :data:`lowp.ops.muon.muon`.

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn:
            as in torch; ``lr`` may be a tensor.
        maximize: go up instead of down.
        capturable, rounding, state_dtype, state_rounding, seed, master, clip_grad_norm: as in
            :class:`lowp.optim.AdamW`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown option, a parameter that is no matrix.
    """

    elementwise = False

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, weight_decay: float = 0.1,
                 momentum: float = 0.95, nesterov: bool = True,
                 ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
                 eps: float = 1e-7, ns_steps: int = 5, adjust_lr_fn: str | None = None, *,
                 rounding: str = "stochastic", state_dtype: str | torch.dtype | None = None,
                 state_rounding: str | None = None, seed: int = 0, master: str | None = None,
                 maximize: bool = False, capturable: bool = False,
                 clip_grad_norm: float | None = None) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("Learning rate", lr), ("momentum", momentum),
                            ("weight decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} should be >= 0 but is: {value}")
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        if len(ns_coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        if not 0 <= ns_steps < 100:
            raise ValueError(f"Number of steps must be in 0 .. 99, got {ns_steps}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                    "nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps,
                    "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "maximize": maximize,
                    "capturable": capturable}
        super().__init__(params, defaults, rounding=rounding, state_rounding=state_rounding,
                         state_dtype=state_dtype, seed=seed, master=master,
                         clip_grad_norm=clip_grad_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; every parameter must be a matrix."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dim() != 2:
                self.param_groups.pop()
                raise ValueError(
                    "Muon only supports 2D parameters whereas we found a parameter with size: "
                    f"{p.size()}"
                )

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """A zero momentum buffer."""
        state = self.new_state(group, index)
        self.add_moment(state, "momentum_buffer", p, group, torch.int8)
        return state

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One update."""
        muon(
            batch.params, batch.grads, batch.of("momentum_buffer"),
            batch.of("momentum_buffer_scale"), batch.of("step"), lr, float(group["momentum"]),
            group["nesterov"], list(group["ns_coefficients"]), group["eps"], group["ns_steps"],
            float(group["weight_decay"]), group["adjust_lr_fn"] or "original", group["maximize"],
            *rounding, group["seed"], batch.ids, batch.offsets, *scaler, batch.masters,
        )
