"""SGD with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.ops.sgd import sgd
from lowp.optim.optimizer import Batch, Optimizer


class SGD(Optimizer):
    """``torch.optim.SGD`` in one fused pass with one rounding a store.

    The formula and its source: :data:`lowp.ops.sgd.sgd`.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch; ``lr`` may
            be a tensor.
        foreach, capturable, fused: accepted, without effect: there is one fused kernel.
        differentiable: must be False.
        rounding, state_dtype, state_rounding, seed, master, clip_grad_norm: as in
            :class:`lowp.optim.AdamW`.

    Raises:
        ValueError: a hyperparameter out of range or an unknown option.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0,
                 dampening: float = 0, weight_decay: float | Tensor = 0, nesterov: bool = False, *,
                 maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
                 differentiable: bool = False, fused: bool | None = None,
                 rounding: str = "stochastic", state_dtype: str | torch.dtype | None = None,
                 state_rounding: str | None = None, seed: int = 0, master: str | None = None,
                 clip_grad_norm: float | None = None) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("learning rate", lr), ("momentum value", momentum),
                            ("weight_decay value", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening,
                    "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize,
                    "capturable": capturable}
        super().__init__(params, defaults, rounding=rounding, state_rounding=state_rounding,
                         state_dtype=state_dtype, seed=seed, master=master,
                         clip_grad_norm=clip_grad_norm, foreach=foreach, fused=fused,
                         differentiable=differentiable)

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """A zero momentum buffer, if there is momentum."""
        state = self.new_state(group, index)
        if group["momentum"] != 0:
            self.add_moment(state, "momentum_buffer", p, group, torch.int8)
        return state

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One fused update."""
        with_momentum = group["momentum"] != 0
        sgd(
            batch.params, batch.grads, batch.of("momentum_buffer") if with_momentum else [],
            batch.of("momentum_buffer_scale") if with_momentum else [], batch.of("step"), lr,
            float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"]),
            group["nesterov"], group["maximize"], *rounding, group["seed"], batch.ids,
            batch.offsets, *scaler, batch.masters,
        )
