"""8-bit codes of optimizer states, by definition: a block float read off the bits of x / amax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256  # elements along the last dimension that share a scale
_SHIFT = 20  # 23 mantissa bits of fp32 less 3
_ONE = 0x3F800000


def state_blocks(x: Tensor) -> Tensor:
    """``x`` [..., K] as [rows, ceil(K / 256), 256], zeros behind a short last block."""
    cols = x.shape[-1] if x.dim() else 1
    rows = x.numel() // cols if cols else 0
    padded = functional.pad(x.reshape(rows, cols), (0, -cols % BLOCK))
    return padded.view(rows, padded.shape[1] // BLOCK, BLOCK)


def _scale_of(blocks: Tensor) -> Tensor:
    bits = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True)
    amax = torch.where(bits < 8 << 23, 0, bits).view(torch.float32)
    return torch.where(bits >= 0x7F800000, torch.nan, amax)


def _fp32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def _encode(y: Tensor, top: int, draw: Tensor | None) -> Tensor:
    """Codes of magnitudes in [0, 1]; ``draw`` 0..65535, ``None`` for nearest with ties up."""
    v = (top << _SHIFT) - (_ONE - y.view(torch.int32))
    code = v + (0x80000 if draw is None else draw.to(torch.int32) << 4) >> _SHIFT
    smallest = 1.25 * 2.0 ** (-16 if top == 127 else -32)  # what code 1 stands for
    frac16 = (y * _fp32(65536.0 / smallest)).clamp_max(65535.0).to(torch.int32)
    low = frac16 + (0x8000 if draw is None else draw.to(torch.int32)) >> 16
    return torch.where(v < 1 << _SHIFT, low, code).clamp_max(top)


def encode(x: Tensor, signed: bool, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes like ``x`` (fp32; int8 or, for x >= 0, uint8) and scales [..., ceil(K / 256)].

    Unsigned codes are at least 1 wherever ``x`` is above zero.
    """
    blocks = state_blocks(x)
    scale = _scale_of(blocks) if blocks.numel() else blocks[..., :1]
    y = torch.where(scale > 0, blocks.abs() / scale.expand_as(blocks), 0.0)
    draws = None if draw is None else state_blocks(draw.reshape(x.shape))
    code = _encode(y, 127 if signed else 255, draws)
    if signed:
        code = torch.where(blocks.signbit(), -code, code)
    else:
        code = torch.where(y > 0, code.clamp_min(1), code)
    cols = x.shape[-1] if x.dim() else 1
    flat = code.flatten(1)[:, :cols].reshape(x.shape)
    lead = x.shape[:-1] if x.dim() else ()
    return flat.to(torch.int8 if signed else torch.uint8), scale.reshape(*lead, blocks.shape[1])


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 values of codes and their scales, as :func:`encode` gives them."""
    top = 127 if codes.dtype == torch.int8 else 255
    magnitude = state_blocks(codes.to(torch.int32).abs())
    bits = _ONE - (top - magnitude << _SHIFT)
    y = torch.where(magnitude == 0, 0.0, bits.to(torch.int32).view(torch.float32))
    x = y * scale.reshape(magnitude.shape[0], magnitude.shape[1], 1)
    x = torch.where(state_blocks(codes.to(torch.int32)) < 0, -x, x)
    cols = codes.shape[-1] if codes.dim() else 1
    return x.flatten(1)[:, :cols].reshape(codes.shape)
