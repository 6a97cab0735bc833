"""scaled_mm: the product of int8 codes, scaled, biased, activated and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.library import Op, deferred, require_choice, require_float_dtype
from lowp.ops.product import ACTIVATIONS, epilogue_of, preact_of, require_bias, strided
from lowp.reference import scaled_mm as reference

MAX_K = 133_144
"""The most products of two codes whose sum an int32 surely holds: (2^31 - 1) // 127^2."""

scaled_mm = Op(
    "scaled_mm(Tensor a, Tensor b, Tensor row_scale, Tensor col_scale, Tensor? bias, "
    "str activation, ScalarType out_dtype, bool save_preact) -> (Tensor y, Tensor preact)"
)
"""``y = act((float(a bᵀ) * row_scale[m]) * col_scale[n] + bias[n])``, rounded once.

The sum is an exact int32; everything after it is fp32, in that order, so y has the same bits on
every backend.

Args:
    a: int8 codes [M, K] in [-127, 127] (-128 is exact up to K = 131,071); any strides.
    b: int8 codes [N, K], alike.
    row_scale: fp32, [M] or one element.
    col_scale: fp32, [N] or one element.
    bias: [N], any float type, or ``None``.
    activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"silu"``.
    out_dtype: fp32, bf16 or fp16.
    save_preact: whether to return what the activation is applied to.

Returns:
    y [M, N]; preact [M, N] in ``out_dtype``, or an empty tensor [0]. A NaN scale (of a group that
    held Inf or NaN) makes its whole row or column NaN, though the codes are 0.

Raises:
    TypeError: a wrong dtype. ValueError: shapes that do not fit, or K > 133,144.
"""


@scaled_mm.check
def _check(a: Tensor, b: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None,
           activation: str, out_dtype: torch.dtype, save_preact: bool) -> None:
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype != torch.int8:
            raise TypeError(f"lowp::scaled_mm: {name} must be int8, got {codes.dtype}")
    left, right = a.shape, b.shape
    if len(left) != 2 or len(right) != 2 or left[1] != right[1]:
        raise ValueError(
            f"lowp::scaled_mm: expected a [M, K] and b [N, K], got {tuple(left)} and {tuple(right)}"
        )
    if left[1] > MAX_K:
        raise ValueError(
            f"lowp::scaled_mm: K must be at most {MAX_K}, beyond which int32 sums may overflow, "
            f"got {left[1]}"
        )
    scales = (("row_scale", row_scale, left[0]), ("col_scale", col_scale, right[0]))
    for name, scale, size in scales:
        if scale.dtype != torch.float32:
            raise TypeError(f"lowp::scaled_mm: {name} must be float32, got {scale.dtype}")
        if scale.numel() not in (1, size):
            raise ValueError(
                f"lowp::scaled_mm: {name} must have {size} elements or 1, got {tuple(scale.shape)}"
            )
    require_bias("scaled_mm", bias, right[0])
    require_choice("scaled_mm", "activation", activation, ACTIVATIONS)
    require_float_dtype("scaled_mm", "out_dtype", out_dtype)


@scaled_mm.fake
def _fake(a: Tensor, b: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None,
          activation: str, out_dtype: torch.dtype, save_preact: bool) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], b.shape[0])
    y = a.new_empty(shape, dtype=out_dtype)
    return y, a.new_empty(shape if save_preact else (0,), dtype=out_dtype)


scaled_mm.kernel("reference")(reference.scaled_mm)


@scaled_mm.kernel("cpu")
def _cpu(a: Tensor, b: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None,
         activation: str, out_dtype: torch.dtype, save_preact: bool) -> tuple[Tensor, Tensor]:
    (rows, depth), cols = a.shape, b.shape[0]
    (a, a_row, a_k), (b, b_row, b_k) = strided(a), strided(b)
    row_scale, col_scale = row_scale.contiguous(), col_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty(rows, cols, dtype=out_dtype)
    preact = preact_of(a, cols, out_dtype, save_preact)
    extension = cpu_extension()
    extension.scaled_mm(
        a.data_ptr(), a_row, a_k, b.data_ptr(), b_row, b_k, rows, cols, depth,
        row_scale.data_ptr(), int(row_scale.numel() > 1), col_scale.data_ptr(),
        int(col_scale.numel() > 1), epilogue_of(bias, activation, y, preact),
        torch.get_num_threads(),
    )
    return y, a.new_empty(0, dtype=out_dtype) if preact is None else preact


def _along_k(codes: Tensor) -> Tensor:
    """Codes adjacent along K, as int8 tensor cores read them; turned if they are the other way."""
    codes, row, k = strided(codes)
    if k == 1:
        return codes
    turned = torch.empty_like(codes, memory_format=torch.contiguous_format)
    if row == 1 and codes.t().is_contiguous():
        rows, depth = codes.shape
        cuda_extension().transpose_codes(cuda_place(codes), codes.data_ptr(), depth, rows,
                                         turned.data_ptr())
        return turned
    return turned.copy_(codes)


@scaled_mm.kernel("cuda")
def _cuda(a: Tensor, b: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None,
          activation: str, out_dtype: torch.dtype, save_preact: bool) -> tuple[Tensor, Tensor]:
    (rows, depth), cols = a.shape, b.shape[0]
    extension = cuda_extension()
    a, b = _along_k(a), _along_k(b)
    row_scale, col_scale = row_scale.contiguous(), col_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty(rows, cols, dtype=out_dtype)
    preact = preact_of(a, cols, out_dtype, save_preact)
    extension.scaled_mm(
        cuda_place(a), a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), rows, cols, depth,
        row_scale.data_ptr(), int(row_scale.numel() > 1), col_scale.data_ptr(),
        int(col_scale.numel() > 1), epilogue_of(bias, activation, y, preact),
    )
    return y, a.new_empty(0, dtype=out_dtype) if preact is None else preact


scaled_mm.kernel("triton")(deferred("scaled_mm"))
