"""Lion on one tensor, by definition."""

from __future__ import annotations

from torch import Tensor

from lowp.reference.stores import (
    Noise,
    fp32,
    load_state,
    load_weight,
    no_nan_payload,
    store_state,
    store_weight,
)


def lion(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor,
         master: Tensor | None, lr: float, beta1: float, beta2: float, weight_decay: float,
         maximize: bool, inv_scale: float, rounding: str, state_rounding: str,
         noise: Noise) -> None:
    """Update everything in place (Chen et al., NeurIPS 2023, algorithm 2)."""
    g = grad.float() * (-inv_scale if maximize else inv_scale)
    m = load_state(exp_avg, exp_avg_scale)
    mean = m * fp32(beta1) + g * fp32(1 - beta1)
    p = load_weight(param, master) * fp32(1 - lr * weight_decay)
    step = mean.sign().where(~mean.isnan(), mean) * fp32(lr)
    store_weight(no_nan_payload(p - step), param, master, rounding, noise)
    m = no_nan_payload(m * fp32(beta2) + g * fp32(1 - beta2))
    store_state(m, exp_avg, exp_avg_scale, state_rounding, noise, 1)
