"""quantize and dequantize for users: differentiable, straight through the rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowp.key import Key, clock
from lowp.ops.dequantize import dequantize as dequantize_op
from lowp.ops.quantize import quantize as quantize_op


class Quantized(NamedTuple):
    """int8 codes with their scales; the tensor is about ``codes * scale``.

    Attributes:
        codes: int8, the tensor's shape [..., K].
        scale: fp32; tensor [], row [..., 1], column [K], block [..., ceil(K / block)].
        granularity, block: which elements share a scale.
        dtype: the float type that was quantized.
        gradient: where gradients pass through if the source required one (no memory), or ``None``.
    """

    codes: Tensor
    scale: Tensor
    granularity: str
    block: int
    dtype: torch.dtype
    gradient: Tensor | None = None


class _Quantize(torch.autograd.Function):
    """Codes and scales have no gradient; the third result stands for ``x`` and has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale = quantize_op(x, *options)
        ctx.mark_non_differentiable(codes, scale)
        return codes, scale, x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[2], *[None] * 8)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *arguments: Any) -> Tensor:
        ctx.dtype = gradient.dtype
        return dequantize_op(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0].to(ctx.dtype), *[None] * 5)


def quantize(x: Tensor, granularity: str = "row", *, block: int = 128, rounding: str = "nearest",
             key: Key | None = None, offset: int = 0) -> Quantized:
    """Symmetric int8 codes of ``x``: the op :data:`lowp.ops.quantize.quantize`, differentiable.

    Gradients pass straight through to ``x`` (Bengio et al., "Estimating or propagating gradients
    through stochastic neurons", 2013, section 4).

    Args:
        x: fp32, bf16 or fp16 tensor [..., K].
        granularity: ``"tensor"``, ``"row"``, ``"column"`` or ``"block"`` of ``block`` elements.
        rounding: ``"nearest"`` or ``"stochastic"`` with the bits of ``key``.
        offset: global row-major index of the first element, when ``x`` is a shard.

    Raises:
        TypeError: ``x`` is not of a float type. ValueError: an unknown option.
    """
    key = key or Key()
    step = clock.on(x.device) if key.step is None else torch.tensor(key.step, dtype=torch.int64)
    options = (granularity, block, rounding, key.seed, step, key.tensor, int(key.role), offset)
    if x.requires_grad and torch.is_grad_enabled():
        codes, scale, gradient = _Quantize.apply(  # type: ignore[no-untyped-call]
            x, *options)
        return Quantized(codes, scale, granularity, block, x.dtype, gradient)
    codes, scale = quantize_op(x, *options)
    return Quantized(codes, scale, granularity, block, x.dtype)


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """``codes * scale`` in fp32, rounded once to ``dtype`` (default: the type that was quantized).

    Raises:
        TypeError, ValueError: parts of ``q`` that do not fit each other.
    """
    arguments = (q.codes, q.scale, q.granularity, q.block, dtype or q.dtype)
    if q.gradient is not None and torch.is_grad_enabled():
        return _Dequantize.apply(  # type: ignore[no-any-return, no-untyped-call]
            q.gradient, *arguments)
    return dequantize_op(*arguments)  # type: ignore[no-any-return]
