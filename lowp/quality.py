"""What a layer's number formats do to its tensors and to the updates of its weight."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowp.key import Key, clock
from lowp.quantized import dequantize, quantize
from lowp.recipe import DTYPES, Product, Recipe
from lowp.reference.rounding import round_to


class Fidelity(NamedTuple):
    """One operand of a product against what its format keeps of it.

    Attributes:
        sqnr: signal to quantization noise, 10 log10(Σ v² / Σ (v − v̂)²) in dB; ``inf`` if exact,
            ``-inf`` if nothing is left or something became Inf or NaN.
        saturated: part of the elements at the largest code (±127), or beyond the largest finite
            value of a 16-bit type. Scales by amax put at least one element of a group there.
        underflowed: part of the elements that are not 0 but become 0.
    """

    sqnr: float
    saturated: float
    underflowed: float


def fidelity(v: Tensor, product: Product, side: str, key: Key) -> Fidelity:
    """What the product's format keeps of an operand.

    Args:
        v: [M, K], contracted along K.
        side: ``"left"`` or ``"right"``: which operand it is.
        key: random bits of a stochastic rounding.
    """
    v = v.detach()
    if v.numel() == 0:
        return Fidelity(math.inf, 0.0, 0.0)
    if product.is_int8:
        operand = getattr(product, side)
        q = quantize(v, operand.granularity, rounding=operand.rounding, key=key)
        kept = dequantize(q, torch.float32)
        saturated = float((q.codes.abs() == 127).float().mean())
    else:
        dtype = DTYPES[product.precision] if product.precision != "fp32" else v.dtype
        kept = v.to(dtype).float()
        saturated = float((kept.isinf() & v.isfinite()).float().mean())
    wide = v.double()
    noise = float((wide - kept).square().sum())
    signal = float(wide.square().sum())
    lost = float(((v != 0) & (kept == 0)).float().mean())
    if noise == 0:
        return Fidelity(math.inf, saturated, lost)
    ratio = signal / noise
    return Fidelity(10 * math.log10(ratio) if ratio > 0 else -math.inf, saturated, lost)


def operands(x: Tensor, w: Tensor, dy: Tensor | None, recipe: Recipe, seed_tensor: int,
             roles: tuple[int, int, int]) -> dict[str, Fidelity]:
    """Fidelity of x [M, K] and w [N, K] in the output product, of dy [M, N] in grad_input."""
    output, grad_input = recipe.product("output"), recipe.product("grad_input")
    found = {
        "x": fidelity(x, output, "left", Key(recipe.seed, None, seed_tensor, roles[0])),
        "w": fidelity(w, output, "right", Key(recipe.seed, None, seed_tensor, roles[1])),
    }
    if dy is not None:
        found["dy"] = fidelity(dy, grad_input, "left",
                               Key(recipe.seed, None, seed_tensor, roles[2]))
    return found


def cosine(a: Tensor | None, b: Tensor | None) -> float | None:
    """Of the angle between two gradients; ``None`` where one is missing or 0."""
    if a is None or b is None:
        return None
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else None


def lost_updates(before: Tensor, after: Tensor, dtype: torch.dtype) -> float | None:
    """Part of the updates that are not 0 but that rounding to nearest would undo.

    Args:
        before: the weight.
        after: what it becomes in fp32.
        dtype: what it is stored in; fp32 is taken as bf16, as if the weight were stored so.

    Returns:
        ``None`` if no element has an update.
    """
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    start = round_to(before.float(), stored, "nearest")
    update = after.float() - before.float()
    moved = update != 0
    if not bool(moved.any()):
        return None
    end = round_to(start.float() + update, stored, "nearest")
    return float((end == start)[moved].float().mean())


def exact_step(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """The optimizer's next update in fp32, each parameter before and after; nothing is changed.

    Weights, gradients and the optimizer's 16-bit states are fp32 while it steps, so nothing is
    rounded; 8-bit states stay what they are.
    """
    saved, now = copy.deepcopy(optimizer.state_dict()), clock.step
    held = [(p, p.data, p.grad) for group in optimizer.param_groups for p in group["params"]]
    try:
        for p, data, grad in held:
            p.grad = None
            p.data = data.to(torch.float32, copy=True)
            p.grad = None if grad is None else grad.float()
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                    state[name] = value.float()
        optimizer.step()
        return {p: (data.float(), p.data) for p, data, grad in held if grad is not None}
    finally:
        for p, data, grad in held:
            p.grad = None
            p.data = data
            p.grad = grad
        optimizer.load_state_dict(saved)
        clock.step = now


def first_adam_step(p: Any, lr: float) -> tuple[Tensor, Tensor]:
    """A weight before and after an Adam step of rate ``lr`` from zero moments: lr · sign(grad)."""
    before = p.detach().float()
    return before, before - lr * p.grad.float().sign()
