"""The product that linear and its two gradients share: checks and the choice of kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from lowp.backend import runs_cpu_kernels
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


def epilogue_of(bias: Tensor | None, activation: str, y: Tensor, preact: Tensor | None,
                backward: bool = False) -> tuple[int, ...]:
    """csrc/linear.h: Epilogue, what follows a sum, where ``preact`` may be written.

    ``backward``: ``preact`` is read, and what follows is the activation's gradient.
    """
    bias_at, bias_type = (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype])
    preact_at, preact_type = (0, 0) if preact is None else (preact.data_ptr(), FLOATS[preact.dtype])
    return (bias_at, bias_type, ACTIVATIONS[activation], y.data_ptr(), FLOATS[y.dtype], preact_at,
            preact_type, backward)


def is_torchs(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`multiply` of fp32 ``a`` and ``b`` would only call torch's own product.

    A small product then takes a third of the time without the op around it. Compiled graphs keep
    the op, which they would have to see through.
    """
    return (
        dtype == torch.float32
        and a.dtype == dtype
        and b.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and a.is_cpu
        and b.is_cpu
        and not torch.compiler.is_compiling()
        and runs_cpu_kernels()
    )


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Asked once: CPUID leaves a virtual machine, which takes longer than a small product."""
    return "avx512bf16" in cpu_extension().cpu_features()


def _library_serves(dtype: torch.dtype, depth: int, bias: Tensor | None, activation: str,
                    out_dtype: torch.dtype, save_preact: bool) -> bool:
    """Whether torch's product is the faster one and keeps the contract.

    fp32: MKL is 1.2 to 1.4 times as fast as our kernel. bf16: oneDNN is 2 times as fast, but its
    result is rounded to bf16 already, and with K not a multiple of 32 (more than half of a 64-byte
    tile row) an Inf or NaN leaks into the row before (seen with torch 2.13 on AMX). fp16: never,
    for torch's product runs far below fp32 on CPUs without fp16 arithmetic.
    """
    if dtype == torch.float32:
        return True
    return (
        dtype == out_dtype == torch.bfloat16
        and activation == "none"
        and not save_preact
        and depth % 32 == 0
        and (bias is None or bias.dtype == torch.bfloat16)
        and _cpu_multiplies_bf16()
    )


def preact_of(a: Tensor, cols: int, dtype: torch.dtype, save: bool,
              derivative_at: Tensor | None = None) -> Tensor | None:
    """What an epilogue reads or writes beside a result of a's rows, where that is anything."""
    if derivative_at is not None:
        return derivative_at.contiguous()
    return a.new_empty(a.shape[0], cols, dtype=dtype) if save else None


def multiply(a: Tensor, b: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
             save_preact: bool, derivative_at: Tensor | None = None,
             dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """``act(a bᵀ + bias)`` of a [M, K], b [N, K]; and the pre-activation if it is to be saved.

    With ``derivative_at`` [M, N] it is ``act'(derivative_at) * (a bᵀ)``. Operands are first
    rounded to ``dtype``, while they are packed; without one they are of one type and stay as is.
    """
    dtype = a.dtype if dtype is None else dtype
    (rows, depth), cols = a.shape, b.shape[0]
    preact = preact_of(a, cols, dtype, save_preact, derivative_at)
    backward = derivative_at is not None
    extension, threads = cpu_extension(), torch.get_num_threads()
    if _library_serves(dtype, depth, bias, activation, out_dtype, save_preact):
        z = functional.linear(cast(a, dtype), cast(b, dtype),
                              None if bias is None else cast(bias, dtype))
        if activation == "none" and out_dtype == dtype and not save_preact:
            return z, preact
        y = z if out_dtype == torch.float32 else a.new_empty(rows, cols, dtype=out_dtype)
        extension.linear_epilogue(z.data_ptr(), rows, cols,
                                  epilogue_of(None, activation, y, preact, backward), threads)
        return y, preact
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty(rows, cols, dtype=out_dtype)
    (a, a_row, a_k), (b, b_row, b_k) = strided(a), strided(b)
    extension.product(a.data_ptr(), FLOATS[a.dtype], a_row, a_k, b.data_ptr(), FLOATS[b.dtype],
                      b_row, b_k, FLOATS[dtype], rows, cols, depth,
                      epilogue_of(bias, activation, y, preact, backward), threads)
    return y, preact


def multiply_cuda(a: Tensor, b: Tensor, bias: Tensor | None, activation: str,
                  out_dtype: torch.dtype, save_preact: bool,
                  derivative_at: Tensor | None = None,
                  row_sums: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """:func:`multiply` by the CUDA kernels. ``row_sums`` [M]: becomes the sums of a's rows, bit for
    bit those of bias_grad, in the product's pass where its kernel can.

    fp32 is torch's product, since tensor cores have no fp32 one; it is the user's own switch
    (``torch.backends.cuda.matmul.fp32_precision``) that may trade its accuracy for TF32.
    """
    (rows, depth), cols = a.shape, b.shape[0]
    extension, place = cuda_extension(), cuda_place(a)
    preact = preact_of(a, cols, a.dtype, save_preact, derivative_at)
    backward = derivative_at is not None
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty(rows, cols, dtype=out_dtype)
    if a.dtype == torch.float32:
        z = functional.linear(a, b)
        extension.linear_epilogue(place, z.data_ptr(), rows, cols,
                                  epilogue_of(bias, activation, y, preact, backward))
        summed = False
    else:
        (a, a_row, a_k), (b, b_row, b_k) = strided(a), strided(b)
        summed = extension.product(place, a.data_ptr(), FLOATS[a.dtype], a_row, a_k, b.data_ptr(),
                                   FLOATS[b.dtype], b_row, b_k, rows, cols, depth,
                                   epilogue_of(bias, activation, y, preact, backward),
                                   0 if row_sums is None else row_sums.data_ptr())
    if row_sums is not None and not summed:
        sum_columns_cuda(a.t(), row_sums)
    return y, preact
