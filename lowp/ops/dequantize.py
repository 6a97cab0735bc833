"""dequantize: int8 codes and fp32 scales back to floats."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.library import (
    FLOATS,
    GRANULARITIES,
    Op,
    deferred,
    require_choice,
    require_float_dtype,
    rows_cols,
)
from lowp.reference import dequantize as reference

dequantize = Op(
    "dequantize(Tensor codes, Tensor scale, str granularity, int block, ScalarType out_dtype) "
    "-> Tensor"
)
"""``codes * scale`` in fp32, rounded once (to nearest even) to ``out_dtype``.

Args:
    codes: int8 [..., K].
    scale: fp32, of the shape that :data:`lowp.ops.quantize.quantize` gives for ``granularity``.
    granularity, block: as they were quantized.
    out_dtype: fp32, bf16 or fp16.

Raises:
    TypeError: a wrong dtype. ValueError: an unknown granularity or a scale of another shape.
"""


@dequantize.check
def _check(codes: Tensor, scale: Tensor, granularity: str, block: int,
           out_dtype: torch.dtype) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"lowp::dequantize: codes must be int8, got {codes.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"lowp::dequantize: scale must be float32, got {scale.dtype}")
    require_choice("dequantize", "granularity", granularity, GRANULARITIES)
    require_float_dtype("dequantize", "out_dtype", out_dtype)
    if codes.dim() == 0:
        raise ValueError("lowp::dequantize: codes must have a dimension, got a 0-dim tensor")
    if granularity == "block" and block < 1:
        raise ValueError(f"lowp::dequantize: block must be positive, got {block}")
    expected: dict[str, tuple[int, ...]] = {
        "tensor": (),
        "row": (*codes.shape[:-1], 1),
        "column": (codes.shape[-1],),
        "block": (*codes.shape[:-1], (codes.shape[-1] + block - 1) // block if block else 0),
    }
    if tuple(scale.shape) != expected[granularity]:
        raise ValueError(
            f"lowp::dequantize: scale must have shape {expected[granularity]} for codes of shape "
            f"{tuple(codes.shape)} and granularity {granularity!r}, got {tuple(scale.shape)}"
        )


@dequantize.fake
def _fake(codes: Tensor, scale: Tensor, granularity: str, block: int,
          out_dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=out_dtype, device=codes.device)


@dequantize.kernel("reference")
def _reference(codes: Tensor, scale: Tensor, granularity: str, block: int,
               out_dtype: torch.dtype) -> Tensor:
    return reference.dequantize(codes, scale, granularity, block, out_dtype)


@dequantize.kernel("cpu")
def _cpu(codes: Tensor, scale: Tensor, granularity: str, block: int,
         out_dtype: torch.dtype) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    y = torch.empty(codes.shape, dtype=out_dtype, device=codes.device)
    rows, cols = rows_cols(codes)
    cpu_extension().dequantize(
        codes.data_ptr(), scale.data_ptr(), rows, cols, GRANULARITIES[granularity], block,
        y.data_ptr(), FLOATS[out_dtype], torch.get_num_threads(),
    )
    return y


@dequantize.kernel("cuda")
def _cuda(codes: Tensor, scale: Tensor, granularity: str, block: int,
          out_dtype: torch.dtype) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    y = torch.empty(codes.shape, dtype=out_dtype, device=codes.device)
    rows, cols = rows_cols(codes)
    cuda_extension().dequantize(
        cuda_place(codes), codes.data_ptr(), scale.data_ptr(), rows, cols,
        GRANULARITIES[granularity], block, y.data_ptr(), FLOATS[out_dtype],
    )
    return y


dequantize.kernel("triton")(deferred("dequantize"))
