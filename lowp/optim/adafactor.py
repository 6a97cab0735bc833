"""Adafactor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.ops.adafactor import adafactor
from lowp.optim.optimizer import Batch, Optimizer


class Adafactor(Optimizer):
    """``torch.optim.Adafactor`` with one rounding a store.

    The formula and its source: :data:`lowp.ops.adafactor.adafactor`. The means of squares of a
    matrix's rows and columns are its only states, kept in fp32 whatever ``state_dtype`` says.

    Args:
        params, lr, beta2_decay, d, weight_decay, maximize: as in torch; ``lr`` may be a tensor.
        eps: as in torch, but ``None`` as the first means the eps of fp32 also for 16-bit
            parameters, since the update is computed in fp32.
        foreach, capturable, rounding, state_dtype, state_rounding, seed, master, clip_grad_norm:
            as in :class:`lowp.optim.AdamW`.

    Raises:
        ValueError: a hyperparameter out of range or an unknown option.
    """

    elementwise = False

    def __init__(self, params: Any, lr: float | Tensor = 1e-2, beta2_decay: float = -0.8,
                 eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0,
                 weight_decay: float = 0.0, *, foreach: bool | None = None,
                 maximize: bool = False, rounding: str = "stochastic",
                 state_dtype: str | torch.dtype | None = None, state_rounding: str | None = None,
                 seed: int = 0, master: str | None = None, capturable: bool = False,
                 clip_grad_norm: float | None = None) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("Learning rate", lr), ("weight_decay", weight_decay),
                            ("epsilon1", 0.0 if eps[0] is None else eps[0]), ("epsilon2", eps[1])):
            if not value >= 0.0:
                raise ValueError(f"{name} should be >= 0 but is: {value}")
        if not beta2_decay <= 0.0:
            raise ValueError(f"beta2_decay should be <= 0 but is: {beta2_decay}")
        if not d >= 1.0:
            raise ValueError(f"Clipping threshold d should be >= 1 but is: {d}")
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d,
                    "weight_decay": weight_decay, "maximize": maximize, "capturable": capturable}
        super().__init__(params, defaults, rounding=rounding, state_rounding=state_rounding,
                         state_dtype=state_dtype, seed=seed, master=master,
                         clip_grad_norm=clip_grad_norm, foreach=foreach)

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """Zero means of squares: of rows and columns, or of a vector's elements."""
        state = self.new_state(group, index)
        if p.dim() > 1:
            state["row_var"] = torch.zeros((*p.shape[:-1], 1), device=p.device)
            state["col_var"] = torch.zeros((*p.shape[:-2], 1, p.shape[-1]), device=p.device)
        else:
            state["variance"] = torch.zeros(p.shape, device=p.device)
        return state

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One fused update."""
        eps1, eps2 = group["eps"]
        adafactor(
            batch.params, batch.grads, batch.of("row_var"), batch.of("col_var"),
            batch.of("variance"), batch.of("step"), lr, group["beta2_decay"],
            torch.finfo(torch.float32).eps if eps1 is None else eps1, eps2, group["d"],
            group["weight_decay"], group["maximize"], rounding[0], group["seed"], batch.ids,
            batch.offsets, *scaler, batch.masters,
        )
