"""int8 codes and scales back to floats, by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.reference.rounding import round_to


def dequantize(codes: Tensor, scale: Tensor, granularity: str, block: int,
               out_dtype: torch.dtype) -> Tensor:
    """``codes * scale`` in fp32, rounded once to ``out_dtype``."""
    if granularity == "block":
        scale = scale.repeat_interleave(block, -1)[..., : codes.shape[-1]]
    return round_to(codes.to(torch.float32) * scale, out_dtype, "nearest")
