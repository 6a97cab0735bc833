"""Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.ops.adamw import adamw
from lowp.ops.update import is_skipped
from lowp.optim.optimizer import Batch, Optimizer
from lowp.optim.repeat import RepeatedUpdate


class Adam(Optimizer):
    """``torch.optim.Adam`` in one fused pass with one rounding a store.

    Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1; AMSGrad:
    Reddi et al., ICLR 2018, algorithm 2. The formula: :data:`lowp.ops.adamw.adamw`.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in
            torch. Weight decay is a part of the gradient unless it is decoupled.
        foreach, capturable, fused, differentiable, rounding, state_dtype, state_rounding, seed,
            master, clip_grad_norm: as in :class:`lowp.optim.AdamW`.

    Raises:
        ValueError: a hyperparameter out of range or an unknown option.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3,
                 betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0, amsgrad: bool = False, *, foreach: bool | None = None,
                 maximize: bool = False, capturable: bool = False, differentiable: bool = False,
                 fused: bool | None = None, decoupled_weight_decay: bool = False,
                 rounding: str = "stochastic", state_dtype: str | torch.dtype | None = None,
                 state_rounding: str | None = None, seed: int = 0, master: str | None = None,
                 clip_grad_norm: float | None = None) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("learning rate", lr), ("epsilon value", eps),
                            ("weight_decay value", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        defaults = {"lr": lr, "betas": tuple(map(float, betas)), "eps": eps,
                    "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize,
                    "capturable": capturable, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_rounding=state_rounding,
                         state_dtype=state_dtype, seed=seed, master=master,
                         clip_grad_norm=clip_grad_norm, foreach=foreach, fused=fused,
                         differentiable=differentiable)
        self._repeats: dict[int, RepeatedUpdate] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; other states have other memory."""
        super().__setstate__(state)
        self._repeats = {}

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """Zero moments."""
        state = self.new_state(group, index)
        self.add_moment(state, "exp_avg", p, group, torch.int8)
        self.add_moment(state, "exp_avg_sq", p, group, torch.uint8)
        if group["amsgrad"]:
            floats = {**group, "state_dtype": "fp32" if group["state_dtype"] == "int8"
                      else group["state_dtype"]}
            self.add_moment(state, "max_exp_avg_sq", p, floats, torch.uint8)
        return state

    def step_group(self, index: int, params: list[Tensor],
                   scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """As every optimizer's; where it is the last step's again, without checking all anew."""
        group, (grad_scale, found_inf) = self.param_groups[index], scaler
        states = [self.state[p] for p in params]
        repeated = self._repeats.get(index)
        if repeated is None or not repeated.takes(params, states, group["amsgrad"]):
            self._repeats.pop(index, None)
            super().step_group(index, params, scaler)
            repeated = RepeatedUpdate.of(params, states, group["amsgrad"])
            if repeated is not None:
                self._repeats[index] = repeated
        elif not is_skipped(found_inf):
            repeated.run(float(group["lr"]), *map(float, group["betas"]), group["weight_decay"],
                         group["eps"], group["maximize"], *self._roundings(group), group["seed"],
                         grad_scale, not group["decoupled_weight_decay"])

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One fused update."""
        beta1, beta2 = map(float, group["betas"])
        adamw(
            batch.params, batch.grads, batch.of("exp_avg"), batch.of("exp_avg_sq"),
            batch.of("exp_avg_scale"), batch.of("exp_avg_sq_scale"),
            batch.of("max_exp_avg_sq") if group["amsgrad"] else [], batch.of("step"), lr, beta1,
            beta2, group["weight_decay"], group["eps"], group["maximize"], *rounding,
            group["seed"], batch.ids, batch.offsets, *scaler,
            not group["decoupled_weight_decay"], batch.masters,
        )
