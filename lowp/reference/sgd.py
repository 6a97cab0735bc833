"""SGD with momentum on one tensor, by definition."""

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


def sgd(param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, momentum_scale: Tensor,
        lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
        maximize: bool, inv_scale: float, rounding: str, state_rounding: str,
        noise: Noise, master: Tensor | None) -> None:
    """Update everything in place; at step 1 the momentum starts as the gradient."""
    p = load_weight(param, master)
    d = grad.float() * (-inv_scale if maximize else inv_scale)
    if weight_decay != 0:
        d = d + p * fp32(weight_decay)
    if momentum_buffer is not None:
        old = load_state(momentum_buffer, momentum_scale)
        buf = d if noise.step == 1 else old * fp32(momentum) + d * fp32(1 - dampening)
        buf = no_nan_payload(buf)
        d = d + buf * fp32(momentum) if nesterov else buf
        store_state(buf, momentum_buffer, momentum_scale, state_rounding, noise, 1)
    store_weight(no_nan_payload(p - d * fp32(lr)), param, master, rounding, noise)
