"""Symmetric int8 quantization, by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.reference.philox import draws

NO_SCALE = 2.0**-119  # a group whose amax is below has scale 0: 127 / amax would leave fp32
_INF = 0x7F800000


def scale_of(amax_bits: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, inv_scale) of groups with the largest absolute bit patterns ``amax_bits`` (int32).

    ``127.0 / amax`` in torch is a reciprocal and a product; the contract is one division.
    """
    amax = amax_bits.view(torch.float32)
    poisoned, zero = amax_bits >= _INF, amax < NO_SCALE
    safe = torch.where(poisoned | zero, 1.0, amax)
    scale = torch.where(poisoned, torch.nan, torch.where(zero, 0.0, safe / 127.0))
    inv_scale = torch.where(poisoned | zero, 0.0, torch.full_like(safe, 127.0) / safe)
    return scale, inv_scale


def round_codes(v: Tensor, draw: Tensor | None) -> Tensor:
    """Codes of scaled values: to nearest even, or up in magnitude iff fraction + draw carries."""
    if draw is None:
        return v.clamp(-127.0, 127.0).round().to(torch.int8)
    magnitude = v.abs().clamp_max(127.0)
    whole = magnitude.floor()
    frac16 = ((magnitude - whole) * 65536.0).floor().to(torch.int64)
    code = whole.to(torch.int64) + ((frac16 + draw) >> 16)
    return torch.where(v < 0, -code, code).to(torch.int8)


def quantize(x: Tensor, granularity: str, block: int, rounding: str, seed: int = 0, step: int = 1,
             tensor: int = 0, role: int = 4, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Codes int8 like ``x`` and their fp32 scales, with ``x`` about ``codes * scale``."""
    cols = x.shape[-1]
    rows = x.numel() // cols if cols else x.shape[:-1].numel()
    values = x.to(torch.float32).reshape(rows, cols)
    width = {"tensor": cols, "row": cols, "column": cols, "block": block}[granularity]
    blocks = -(-cols // width) if granularity == "block" else 1
    padded = torch.nn.functional.pad(values, (0, blocks * width - cols)) if blocks else values
    bits = padded.contiguous().view(torch.int32) & 0x7FFFFFFF
    bits = torch.nn.functional.pad(bits, (0, 0, 0, 1))  # a row of zeros: an empty amax is 0
    shape: tuple[int, ...]
    if granularity == "tensor":
        amax, shape = bits.reshape(-1).max() if bits.numel() else bits.new_zeros(()), ()
    elif granularity == "column":
        amax, shape = bits.amax(0), (cols,)
    else:
        groups = bits[:rows].reshape(rows, blocks, width if blocks else 0)
        amax = groups.amax(2) if groups.numel() else bits.new_zeros(rows, blocks)
        shape = (*x.shape[:-1], blocks)
    scale, inv_scale = scale_of(amax)
    if granularity == "block":
        inv_scale = inv_scale.repeat_interleave(width, 1)[:, :cols]
    scaled = torch.where(inv_scale == 0, 0.0, values * inv_scale)
    draw = draws(seed, step, tensor, role, x.numel(), offset) if rounding == "stochastic" else None
    codes = round_codes(scaled, None if draw is None else draw.view(rows, cols))
    return codes.reshape(x.shape), scale.reshape(shape)


def quantize_row_col(x: Tensor, rounding: str, seed: int = 0, step: int = 1, tensor: int = 0,
                     row_role: int = 6, col_role: int = 7, offset: int = 0,
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row codes [M, K], row scale [M, 1], column codes transposed [K, M], column scale [K]."""
    codes, scale = quantize(x, "row", 0, rounding, seed, step, tensor, row_role, offset)
    col_codes, col_scale = quantize(x, "column", 0, rounding, seed, step, tensor, col_role, offset)
    return codes, scale, col_codes.t().contiguous(), col_scale
