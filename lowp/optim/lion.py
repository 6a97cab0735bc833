"""Lion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.ops.lion import lion
from lowp.optim.optimizer import Batch, Optimizer


class Lion(Optimizer):
    """Lion in one fused pass with one rounding a store; one moment, so half the state of Adam.

    Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2. The
    formula: :data:`lowp.ops.lion.lion`. As every element moves by ``lr``, the paper (section 5)
    uses a rate 3 to 10 times smaller than AdamW's, and a weight decay as many times larger.

    Args:
        params: an iterable of parameters, of (name, parameter), or of groups of either.
        lr: learning rate, may be a tensor.
        betas: of the mean whose sign is the step, and of the moment that is kept.
        weight_decay: decoupled, as in AdamW.
        maximize: go up instead of down.
        foreach, capturable, fused: accepted, without effect: there is one fused kernel.
        differentiable: must be False.
        rounding, state_dtype, state_rounding, seed, master, clip_grad_norm: as in
            :class:`lowp.optim.AdamW`.

    Raises:
        ValueError: a hyperparameter out of range or an unknown option.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *,
                 maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
                 differentiable: bool = False, fused: bool | None = None,
                 rounding: str = "stochastic", state_dtype: str | torch.dtype | None = None,
                 state_rounding: str | None = None, seed: int = 0, master: str | None = None,
                 clip_grad_norm: float | None = None) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("learning rate", lr), ("weight_decay value", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize,
                    "capturable": capturable}
        super().__init__(params, defaults, rounding=rounding, state_rounding=state_rounding,
                         state_dtype=state_dtype, seed=seed, master=master,
                         clip_grad_norm=clip_grad_norm, foreach=foreach, fused=fused,
                         differentiable=differentiable)

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """A zero moment."""
        state = self.new_state(group, index)
        self.add_moment(state, "exp_avg", p, group, torch.int8)
        return state

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One fused update."""
        beta1, beta2 = map(float, group["betas"])
        lion(
            batch.params, batch.grads, batch.of("exp_avg"), batch.of("exp_avg_scale"),
            batch.of("step"), lr, beta1, beta2, float(group["weight_decay"]), group["maximize"],
            *rounding, group["seed"], batch.ids, batch.offsets, *scaler, batch.masters,
        )
