"""activation_grad: the gradient before an activation, from the one after it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.library import FLOATS, Op, deferred, require_choice, require_float
from lowp.ops.product import ACTIVATIONS
from lowp.reference import activation as reference
from lowp.reference.rounding import round_to

activation_grad = Op("activation_grad(Tensor dy, Tensor preact, str activation) -> Tensor")
"""``dz = dy * act'(preact)`` in fp32, rounded once to ``dy``'s type.

Args:
    dy: fp32, bf16 or fp16, any shape.
    preact: what the activation was applied to; ``dy``'s shape, any float type.
    activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"silu"``.

Error of the derivative: 4e-6; relu's is 0 at 0 and 1 at NaN. Every NaN result is the quiet one.

Raises:
    TypeError: a type that is no float. ValueError: shapes that differ, an unknown activation.
"""


@activation_grad.check
def _check(dy: Tensor, preact: Tensor, activation: str) -> None:
    require_float("activation_grad", "dy", dy)
    require_float("activation_grad", "preact", preact)
    require_choice("activation_grad", "activation", activation, ACTIVATIONS)
    if dy.shape != preact.shape:
        raise ValueError(
            f"lowp::activation_grad: dy and preact must have one shape, got {tuple(dy.shape)} and "
            f"{tuple(preact.shape)}"
        )


@activation_grad.fake
def _fake(dy: Tensor, preact: Tensor, activation: str) -> Tensor:
    return torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)


@activation_grad.kernel("reference")
def _reference(dy: Tensor, preact: Tensor, activation: str) -> Tensor:
    dz = reference.gradient(dy.float().contiguous(), preact.float().contiguous(), activation)
    return round_to(dz, dy.dtype, "nearest")


@activation_grad.kernel("cpu")
def _cpu(dy: Tensor, preact: Tensor, activation: str) -> Tensor:
    dy, preact = dy.contiguous(), preact.contiguous()
    dz = torch.empty(dy.shape, dtype=dy.dtype)
    cpu_extension().activation_grad(
        dy.data_ptr(), FLOATS[dy.dtype], preact.data_ptr(), FLOATS[preact.dtype], dy.numel(),
        ACTIVATIONS[activation], dz.data_ptr(), torch.get_num_threads(),
    )
    return dz


@activation_grad.kernel("cuda")
def _cuda(dy: Tensor, preact: Tensor, activation: str) -> Tensor:
    dy, preact = dy.contiguous(), preact.contiguous()
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    cuda_extension().activation_grad(
        cuda_place(dy), dy.data_ptr(), FLOATS[dy.dtype], preact.data_ptr(), FLOATS[preact.dtype],
        dy.numel(), ACTIVATIONS[activation], dz.data_ptr(),
    )
    return dz


activation_grad.kernel("triton")(deferred("activation_grad"))
