"""AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowp.optim.adam import Adam


class AdamW(Adam):
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
            block of 256; it is for matrices and higher dimensions of at least 4096 elements in
            the whole, unsharded tensor (the others keep fp32).
        state_rounding: of states that are not fp32; ``None``: as ``rounding``. A second moment
            rounded to nearest stands still, as a step moves it by less than half a unit
            (benchmarks/results/optimizer_curves.json has the losses of both).
        seed: of the draws; the same seed gives the same bits on any machine, number of threads and
            number of ranks.
        master: what is kept of the bits that a 16-bit weight lacks: ``None``; ``"remainder"``: of a
            bf16 weight all 16 others, so that training is that of fp32 weights bit for bit and
            ``rounding`` has no effect on them (the weight is the nearest bf16); ``"kahan"``: what
            its rounding to nearest lost, in 16 bits that are stored with ``rounding`` (Zamirai et
            al., "Revisiting BFloat16 training", 2020, section 3). Either takes 2 bytes an element;
            fp32 weights need none.
        clip_grad_norm: largest norm of all gradients of the optimizer together, as
            ``torch.nn.utils.clip_grad_norm_`` defines it; the factor is applied inside the update,
            and no gradient is written. Sharded gradients are gathered for it, one at a time, so
            that the norm has one process's bits. ``None``: no clipping.

    Raises:
        ValueError: a hyperparameter out of range or an unknown option.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3,
                 betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
                 foreach: bool | None = None, capturable: bool = False,
                 differentiable: bool = False, fused: bool | None = None,
                 rounding: str = "stochastic", state_dtype: str | torch.dtype | None = None,
                 state_rounding: str | None = None, seed: int = 0, master: str | None = None,
                 clip_grad_norm: float | None = None) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach,
                         maximize=maximize, capturable=capturable, differentiable=differentiable,
                         fused=fused, decoupled_weight_decay=True, rounding=rounding,
                         state_dtype=state_dtype, state_rounding=state_rounding, seed=seed,
                         master=master, clip_grad_norm=clip_grad_norm)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch: a state of Adam that is loaded here becomes one of AdamW."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
