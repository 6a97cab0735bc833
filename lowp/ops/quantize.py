"""quantize: a float tensor to int8 codes and fp32 scales."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.library import (
    FLOATS,
    GRANULARITIES,
    ROUNDINGS,
    Op,
    deferred,
    require_choice,
    require_float,
    rows_cols,
)
from lowp.reference import quantize as reference

quantize = Op(
    "quantize(Tensor x, str granularity, int block, str rounding, int seed, Tensor? step, "
    "int tensor, int role, int offset) -> (Tensor codes, Tensor scale)"
)
"""Symmetric int8 quantization, ``x`` about ``codes * scale``.

``amax`` is the largest magnitude of a group; ``scale = amax / 127``, ``inv_scale = 127 / amax``
(one IEEE division each), ``code = round(x * inv_scale)`` cut to [-127, 127].

Args:
    x: float tensor [..., K].
    granularity: which elements share a scale: ``"tensor"`` (scale []), ``"row"`` ([..., 1]),
        ``"column"`` ([K], over all leading dimensions), ``"block"`` of ``block`` elements along the
        last dimension ([..., ceil(K / block)]; a block never spans rows).
    rounding: ``"nearest"`` (ties to even) or ``"stochastic"``: up in magnitude with the probability
        of the fraction cut to 16 bits, so the bias is below 2^-16 code, toward zero.
    seed, step, tensor, role, offset: the random bits (:mod:`lowp.key`); ``offset`` is the global
        row-major index of ``x``'s first element. ``step`` is a 0-dim int64 tensor; ``None``: 1.

A group whose amax is below 2^-119 has codes 0 and scale 0. A group with Inf or NaN has codes 0 and
scale NaN, so the damage shows in whatever uses it. Error: half a scale (nearest), one (stochastic).

Raises:
    TypeError: ``x`` is not fp32, bf16 or fp16. ValueError: an unknown option, or no dimension.
"""


def step_of(step: Tensor | None) -> int:
    """The step that a 0-dim tensor holds; 1 without one."""
    return 1 if step is None else int(step.item())


def device_step(step: Tensor | None, x: Tensor) -> tuple[int, int]:
    """The step as a value, or 0 and its address where that is on ``x``'s device."""
    if step is None or step.device != x.device or step.dtype != torch.int64:
        return step_of(step), 0
    return 0, step.data_ptr()


@quantize.check
def _check(x: Tensor, granularity: str, block: int, rounding: str, seed: int, step: Tensor | None,
           tensor: int, role: int, offset: int) -> None:
    require_float("quantize", "x", x)
    require_choice("quantize", "granularity", granularity, GRANULARITIES)
    require_choice("quantize", "rounding", rounding, ROUNDINGS)
    if x.dim() == 0:
        raise ValueError("lowp::quantize: x must have at least one dimension, got a 0-dim tensor")
    if granularity == "block" and block < 1:
        raise ValueError(f"lowp::quantize: block must be positive, got {block}")
    if offset < 0:
        raise ValueError(f"lowp::quantize: offset must not be negative, got {offset}")


@quantize.fake
def _fake(x: Tensor, granularity: str, block: int, rounding: str, seed: int, step: Tensor | None,
          tensor: int, role: int, offset: int) -> tuple[Tensor, Tensor]:
    return outputs(x, granularity, block)


def outputs(x: Tensor, granularity: str, block: int) -> tuple[Tensor, Tensor]:
    """Uninitialized codes and scale for ``x``."""
    shape: tuple[int, ...]
    if granularity == "row":
        shape = (*x.shape[:-1], 1)
    elif granularity == "column":
        shape = (x.shape[-1],)
    elif granularity == "block":
        shape = (*x.shape[:-1], (x.shape[-1] + block - 1) // block)
    else:
        shape = ()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(shape, dtype=torch.float32, device=x.device)


@quantize.kernel("reference")
def _reference(x: Tensor, granularity: str, block: int, rounding: str, seed: int,
               step: Tensor | None, tensor: int, role: int, offset: int) -> tuple[Tensor, Tensor]:
    return reference.quantize(x, granularity, block, rounding, seed, step_of(step), tensor, role,
                              offset)


@quantize.kernel("cpu")
def _cpu(x: Tensor, granularity: str, block: int, rounding: str, seed: int, step: Tensor | None,
         tensor: int, role: int, offset: int) -> tuple[Tensor, Tensor]:
    extension = cpu_extension()
    x = x.contiguous()
    codes, scale = outputs(x, granularity, block)
    rows, cols = rows_cols(x)
    now = step_of(step) if rounding == "stochastic" else 1
    key = (seed & (2**64 - 1), now, tensor, role)
    extension.quantize(
        x.data_ptr(), FLOATS[x.dtype], rows, cols, GRANULARITIES[granularity], block,
        ROUNDINGS[rounding], key, offset, codes.data_ptr(), scale.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, scale


@quantize.kernel("cuda")
def _cuda(x: Tensor, granularity: str, block: int, rounding: str, seed: int, step: Tensor | None,
          tensor: int, role: int, offset: int) -> tuple[Tensor, Tensor]:
    extension = cuda_extension()
    x = x.contiguous()
    codes, scale = outputs(x, granularity, block)
    rows, cols = rows_cols(x)
    now, address = device_step(step, x)
    words = {"tensor": 1, "column": cols}.get(granularity, 0)
    workspace = torch.zeros(words, dtype=torch.int32, device=x.device)
    extension.quantize(
        cuda_place(x), x.data_ptr(), FLOATS[x.dtype], rows, cols, GRANULARITIES[granularity], block,
        ROUNDINGS[rounding], (seed & (2**64 - 1), now, tensor, role), address, offset,
        codes.data_ptr(), scale.data_ptr(), workspace.data_ptr(),
    )
    return codes, scale


quantize.kernel("triton")(deferred("quantize"))
