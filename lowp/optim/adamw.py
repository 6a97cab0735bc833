"""AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.ops.adamw import adamw
from lowp.optim.optimizer import Batch, Optimizer


class AdamW(Optimizer):
    """``torch.optim.AdamW`` in one fused pass with one rounding a store.

    The formula and its source: :data:`lowp.ops.adamw.adamw`. Sharded parameters (DTensor, as FSDP2
    and tensor parallelism make them) get the bits of unsharded ones, and sharded states.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch; ``lr`` may be a
            tensor.
        foreach, capturable, fused: accepted, without effect: there is one fused kernel.
        differentiable: must be False.
        rounding: of 16-bit weights: ``"stochastic"`` (an update smaller than half an ulp is kept in
            the mean; Gupta et al., ICML 2015, section 3) or ``"nearest"``. fp32 is not rounded.
        state_dtype: of the moments: ``None`` for the parameter's type, ``"fp32"``, ``"bf16"``,
            ``"fp16"``, ``"int8"`` or that ``torch.dtype``. int8 takes a byte an element and 4 a
            block of 256, and applies to matrices and higher dimensions of at least 4096 elements
            in the whole, unsharded tensor (the others keep fp32).
        state_rounding: of states that are not fp32; ``None``: 16-bit states as the weights (a
            second moment that is rounded to nearest in bf16 stands still), 8-bit states to nearest.
        seed: of the draws; the same seed gives the same bits on any machine, number of threads and
            number of ranks.

    Raises:
        ValueError: a hyperparameter out of range or an unknown option.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3,
                 betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
                 foreach: bool | None = None, capturable: bool = False,
                 differentiable: bool = False, fused: bool | None = None,
                 rounding: str = "stochastic", state_dtype: str | torch.dtype | None = None,
                 state_rounding: str | None = None, seed: int = 0) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("learning rate", lr), ("epsilon value", eps),
                            ("weight_decay value", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                    "amsgrad": amsgrad, "maximize": maximize, "capturable": capturable}
        super().__init__(params, defaults, rounding=rounding, state_rounding=state_rounding,
                         state_dtype=state_dtype, seed=seed, foreach=foreach, fused=fused,
                         differentiable=differentiable)

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
        )
