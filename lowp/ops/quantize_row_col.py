"""quantize_row_col: both sets of codes that the two products of a backward pass need."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.native import cpu_extension, cuda_extension, cuda_place
from lowp.ops.library import FLOATS, ROUNDINGS, Op, deferred, require_choice, require_float
from lowp.ops.quantize import device_step, step_of
from lowp.reference import quantize as reference

quantize_row_col = Op(
    "quantize_row_col(Tensor x, str rounding, int seed, Tensor? step, int tensor, int row_role, "
    "int col_role, int offset) -> (Tensor codes, Tensor scale, Tensor col_codes, Tensor col_scale)"
)
"""Row codes and transposed column codes of a matrix in one call.

Equal bit for bit to :data:`lowp.ops.quantize.quantize` by row with ``row_role`` and by column with
``col_role``. ``x`` [M, K] gives ``codes`` [M, K], ``scale`` [M, 1], ``col_codes`` [K, M] and
``col_scale`` [K].

Raises:
    TypeError: ``x`` is not fp32, bf16 or fp16. ValueError: an unknown option, or not a matrix.
"""


@quantize_row_col.check
def _check(x: Tensor, rounding: str, seed: int, step: Tensor | None, tensor: int, row_role: int,
           col_role: int, offset: int) -> None:
    require_float("quantize_row_col", "x", x)
    require_choice("quantize_row_col", "rounding", rounding, ROUNDINGS)
    if x.dim() != 2:
        raise ValueError(
            f"lowp::quantize_row_col: x must be a matrix [M, K], got shape {tuple(x.shape)}"
        )
    if offset < 0:
        raise ValueError(f"lowp::quantize_row_col: offset must not be negative, got {offset}")


@quantize_row_col.fake
def _fake(x: Tensor, rounding: str, seed: int, step: Tensor | None, tensor: int, row_role: int,
          col_role: int, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return outputs(x)


def outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized codes and scales for ``x``."""
    rows, cols = x.shape
    codes = torch.empty((rows, cols), dtype=torch.int8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    col_codes = torch.empty((cols, rows), dtype=torch.int8, device=x.device)
    return codes, scale, col_codes, torch.empty((cols,), dtype=torch.float32, device=x.device)


@quantize_row_col.kernel("reference")
def _reference(x: Tensor, rounding: str, seed: int, step: Tensor | None, tensor: int,
               row_role: int, col_role: int, offset: int) -> tuple[Tensor, ...]:
    return reference.quantize_row_col(x, rounding, seed, step_of(step), tensor, row_role, col_role,
                                      offset)


@quantize_row_col.kernel("cpu")
def _cpu(x: Tensor, rounding: str, seed: int, step: Tensor | None, tensor: int, row_role: int,
         col_role: int, offset: int) -> tuple[Tensor, ...]:
    extension = cpu_extension()
    x = x.contiguous()
    codes, scale, col_codes, col_scale = outputs(x)
    seed, now = seed & (2**64 - 1), step_of(step)
    extension.quantize_row_col(
        x.data_ptr(), FLOATS[x.dtype], *x.shape, ROUNDINGS[rounding], (seed, now, tensor, row_role),
        (seed, now, tensor, col_role), offset, codes.data_ptr(), scale.data_ptr(),
        col_codes.data_ptr(), col_scale.data_ptr(), torch.get_num_threads(),
    )
    return codes, scale, col_codes, col_scale


@quantize_row_col.kernel("cuda")
def _cuda(x: Tensor, rounding: str, seed: int, step: Tensor | None, tensor: int, row_role: int,
          col_role: int, offset: int) -> tuple[Tensor, ...]:
    extension = cuda_extension()
    x = x.contiguous()
    codes, scale, col_codes, col_scale = outputs(x)
    seed, (now, address) = seed & (2**64 - 1), device_step(step, x)
    workspace = torch.zeros(sum(x.shape), dtype=torch.int32, device=x.device)
    extension.quantize_row_col(
        cuda_place(x), x.data_ptr(), FLOATS[x.dtype], *x.shape, ROUNDINGS[rounding],
        (seed, now, tensor, row_role), (seed, now, tensor, col_role), address, offset,
        codes.data_ptr(), scale.data_ptr(), col_codes.data_ptr(), col_scale.data_ptr(),
        workspace.data_ptr(),
    )
    return codes, scale, col_codes, col_scale


quantize_row_col.kernel("triton")(deferred("quantize_row_col"))
