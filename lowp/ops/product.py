"""The product that linear and its two gradients share: checks and the choice of kernel."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.bias_grad import sum_columns_cuda
from lowp.ops.library import FLOATS

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""csrc/numerics/activation.h: Activation"""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which costs a call into torch even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def require_matrices(op: str, **operands: Tensor) -> None:
    """Raises unless all are matrices of one float type."""
    (first, x), *_ = operands.items()
    for name, t in operands.items():
        if t.dtype not in FLOATS:
            raise TypeError(
                f"lowp::{op}: {name} must be float32, bfloat16 or float16, got {t.dtype}"
            )
        if t.dim() != 2:
            raise ValueError(f"lowp::{op}: {name} must be a matrix, got shape {tuple(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(
                f"lowp::{op}: {first} and {name} must be of one type, got {x.dtype} and {t.dtype}"
            )


def require_bias(op: str, bias: Tensor | None, columns: int) -> None:
    """Raises unless ``bias`` is absent or a float vector of ``columns``."""
    if bias is None:
        return
    if bias.dtype not in FLOATS:
        raise TypeError(
            f"lowp::{op}: bias must be float32, bfloat16 or float16, got {bias.dtype}"
        )
    if bias.shape != (columns,):
        raise ValueError(
            f"lowp::{op}: bias must have shape ({columns},), got {tuple(bias.shape)}"
        )


def strided(x: Tensor) -> tuple[Tensor, int, int]:
    """A matrix with one stride 1, as the kernels read it, and its strides; a copy if need be."""
    if 1 not in x.stride():
        x = x.contiguous()
    row, k = x.stride()
    return x, row, 1 if x.shape[1] == 1 else k  # the stride of a single column means nothing


def _operand(extension: ModuleType, x: Tensor) -> tuple[Any, Tensor]:
    """The kernel's view of a matrix whose second dimension is summed over, and what owns it."""
    x, row, k = strided(x)
    return extension.Operand(x.data_ptr(), FLOATS[x.dtype], row, k), x


def epilogue_of(extension: ModuleType, bias: Tensor | None, activation: str, y: Tensor,
                preact: Tensor) -> Any:
    """The kernel's view of what follows a sum; an empty ``preact`` is not written."""
    return extension.Epilogue(
        0 if bias is None else bias.data_ptr(),
        FLOATS[torch.float32 if bias is None else bias.dtype],
        ACTIVATIONS[activation], y.data_ptr(), FLOATS[y.dtype],
        preact.data_ptr() if preact.numel() else 0, FLOATS[preact.dtype],
    )


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Asked once: CPUID leaves a virtual machine, which takes longer than a small product."""
    return "avx512bf16" in cpu_extension().cpu_features()


def _library_serves(a: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
                    save_preact: bool) -> bool:
    """Whether torch's product is the faster one and keeps the contract.

    fp32: MKL is 1.2 to 1.4 times as fast as our kernel. bf16: oneDNN is 2 times as fast, but its
    result is rounded to bf16 already, and with K not a multiple of 32 (more than half of a 64-byte
    tile row) an Inf or NaN leaks into the row before (seen with torch 2.13 on AMX). fp16: never,
    for torch's product runs far below fp32 on CPUs without fp16 arithmetic.
    """
    if a.dtype == torch.float32:
        return True
    return (
        a.dtype == out_dtype == torch.bfloat16
        and activation == "none"
        and not save_preact
        and a.shape[1] % 32 == 0
        and (bias is None or bias.dtype == torch.bfloat16)
        and _cpu_multiplies_bf16()
    )


def multiply(a: Tensor, b: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
             save_preact: bool) -> tuple[Tensor, Tensor]:
    """``act(a bᵀ + bias)`` of a [M, K], b [N, K]; and the pre-activation (empty unless saved)."""
    (rows, depth), cols = a.shape, b.shape[0]
    preact = a.new_empty((rows, cols) if save_preact else 0)
    extension, threads = cpu_extension(), torch.get_num_threads()
    if _library_serves(a, bias, activation, out_dtype, save_preact):
        z = functional.linear(a, b, None if bias is None else cast(bias, a.dtype))
        if activation == "none" and out_dtype == a.dtype and not save_preact:
            return z, preact
        y = z if out_dtype == torch.float32 else a.new_empty((rows, cols), dtype=out_dtype)
        extension.linear_epilogue(z.data_ptr(), rows, cols,
                                  epilogue_of(extension, None, activation, y, preact), threads)
        return y, preact
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty((rows, cols), dtype=out_dtype)
    (left, a), (right, b) = _operand(extension, a), _operand(extension, b)
    extension.product(left, right, rows, cols, depth,
                      epilogue_of(extension, bias, activation, y, preact), threads)
    return y, preact


def multiply_cuda(a: Tensor, b: Tensor, bias: Tensor | None, activation: str,
                  out_dtype: torch.dtype, save_preact: bool,
                  row_sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`multiply` by the CUDA kernels. ``row_sums`` [M]: becomes the sums of a's rows, bit for
    bit those of bias_grad, in the product's pass where its kernel can.

    fp32 is torch's product, since tensor cores have no fp32 one; it is the user's own switch
    (``torch.backends.cuda.matmul.fp32_precision``) that may trade its accuracy for TF32.
    """
    (rows, depth), cols = a.shape, b.shape[0]
    extension, place = cuda_extension(), cuda_place(a)
    preact = a.new_empty((rows, cols) if save_preact else 0)
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty((rows, cols), dtype=out_dtype)
    if a.dtype == torch.float32:
        z = functional.linear(a, b)
        extension.linear_epilogue(place, z.data_ptr(), rows, cols,
                                  epilogue_of(extension, bias, activation, y, preact))
        summed = False
    else:
        (left, a), (right, b) = _operand(extension, a), _operand(extension, b)
        summed = extension.product(place, left, right, rows, cols, depth,
                                   epilogue_of(extension, bias, activation, y, preact),
                                   0 if row_sums is None else row_sums.data_ptr())
    if row_sums is not None and not summed:
        sum_columns_cuda(a.t(), row_sums)
    return y, preact
