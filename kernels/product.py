"""The matrix product of linear, its gradients and scaled_mm: tiles, their choice, the epilogue."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lowp.kernels import launch as launches
from lowp.kernels.activation import activate, activation_gradient
from lowp.kernels.launch import EXACT, launch
from lowp.kernels.numerics import canonical_nan, to_nearest, widen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lowp.ops.product import strided

RASTER = tl.constexpr(8)  # rows of tiles that programs walk down together, to share operands


@triton.jit
def _tile_of(tile, down, across):
    """Row and column of a tile: down RASTER rows, then across."""
    band = tile // (RASTER * across)
    height = tl.minimum(down - band * RASTER, RASTER)
    inside = tile % (RASTER * across)
    return band * RASTER + inside % height, inside // height


@triton.jit
def _store(acc, row, col, rows, cols, bias, row_scale, col_scale, y, preact,
           ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, ROW_SCALES: tl.constexpr,
           COL_SCALES: tl.constexpr):
    """What follows the sums of a tile: scales, bias, activation, one rounding a store; BACKWARD:
    preact is read, and what follows is the activation's gradient."""
    z = acc.to(tl.float32)
    if row_scale is not None:
        at = row if ROW_SCALES else row * 0
        z = z * tl.load(row_scale + at, mask=row < rows, other=0.0)[:, None]
        at = col if COL_SCALES else col * 0
        z = z * tl.load(col_scale + at, mask=col < cols, other=0.0)[None, :]
    if bias is not None:
        z = z + widen(tl.load(bias + col, mask=col < cols, other=0.0))[None, :]
    at = (row * cols)[:, None] + col[None, :]
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    if BACKWARD:
        z = activation_gradient(z, widen(tl.load(preact + at, mask=mask, other=0.0)), ACTIVATION)
    else:
        if preact is not None:
            tl.store(preact + at, to_nearest(canonical_nan(z), preact.dtype.element_ty), mask=mask)
        z = activate(z, ACTIVATION)
    tl.store(y + at, to_nearest(z, y.dtype.element_ty), mask=mask)


@triton.jit
def _finish(acc, row, first, rows, cols, bias, row_scale, col_scale, y, preact,
            ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, ROW_SCALES: tl.constexpr,
            COL_SCALES: tl.constexpr):
    """A tile from column ``first`` on, in halves down to 64 columns, as registers have room for."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    if N > 64:
        left, right = tl.split(tl.permute(tl.reshape(acc, [M, 2, N // 2]), [0, 2, 1]))
        _finish(left, row, first, rows, cols, bias, row_scale, col_scale, y, preact, ACTIVATION,
                BACKWARD, ROW_SCALES, COL_SCALES)
        _finish(right, row, first + N // 2, rows, cols, bias, row_scale, col_scale, y, preact,
                ACTIVATION, BACKWARD, ROW_SCALES, COL_SCALES)
    else:
        _store(acc, row, first + tl.arange(0, N), rows, cols, bias, row_scale, col_scale, y, preact,
               ACTIVATION, BACKWARD, ROW_SCALES, COL_SCALES)


@triton.jit
def _multiply(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a b. The interpreter multiplies bf16 as if it were integers, so it gets fp32."""
    if INTERPRET and a.dtype != tl.int8:
        a, b = widen(a), widen(b)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit(do_not_specialize=["rows", "depth"])
def _product(a, b, y, preact, bias, row_scale, col_scale, row_sums, rows: tl.int64, cols: tl.int64,
             depth: tl.int64, a_stride: tl.int64, b_stride: tl.int64, BM: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
             A_VECTOR: tl.constexpr, B_VECTOR: tl.constexpr, ACTIVATION: tl.constexpr,
             BACKWARD: tl.constexpr, ROW_SCALES: tl.constexpr, COL_SCALES: tl.constexpr,
             INTERPRET: tl.constexpr):
    """One tile a program. a [rows, depth], or TURNED: stored [depth, rows]; b [cols, depth] alike.

    VECTOR: a power of two that divides the contiguous dimension and the stride, up to 16. Said so,
    masked loads are that wide though rows and depth are no part of the compiled kernel.
    """
    integer: tl.constexpr = a.dtype.element_ty == tl.int8
    tile = tl.program_id(0).to(tl.int64)
    tile_row, tile_col = _tile_of(tile, tl.cdiv(rows, BM), tl.cdiv(cols, BN))
    row = tile_row * BM + tl.arange(0, BM)
    col = tile_col * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_end = depth if A_TURNED else depth // A_VECTOR * A_VECTOR
    b_end = depth if B_TURNED else depth // B_VECTOR * B_VECTOR
    row_end = rows // A_VECTOR * A_VECTOR if A_TURNED else rows
    col_end = cols // B_VECTOR * B_VECTOR if B_TURNED else cols
    a_stride = a_stride // A_VECTOR * A_VECTOR
    b_stride = b_stride // B_VECTOR * B_VECTOR
    acc = tl.zeros([BM, BN], tl.int32 if integer else tl.float32)
    sums = tl.zeros([BM], tl.float32)
    if A_TURNED:
        a += inner[:, None].to(tl.int64) * a_stride + row[None, :]
    else:
        a += row[:, None] * a_stride + inner[None, :]
    if B_TURNED:
        b += inner[:, None].to(tl.int64) * b_stride + col[None, :]
    else:
        b += col[:, None] * b_stride + inner[None, :]
    for first in range(0, depth, BK):
        k = first + inner.to(tl.int64)
        if A_TURNED:
            left = tl.load(a, mask=(k < a_end)[:, None] & (row < row_end)[None, :], other=0)
            left = tl.trans(left)
            a += BK * a_stride
        else:
            left = tl.load(a, mask=(row < row_end)[:, None] & (k < a_end)[None, :], other=0)
            a += BK
        if B_TURNED:
            right = tl.load(b, mask=(k < b_end)[:, None] & (col < col_end)[None, :], other=0)
            b += BK * b_stride
        else:
            right = tl.load(b, mask=(col < col_end)[:, None] & (k < b_end)[None, :], other=0)
            right = tl.trans(right)
            b += BK
        acc = _multiply(left, right, acc, INTERPRET)
        if row_sums is not None and tile_col == 0:
            sums += tl.sum(widen(left), axis=1)
    if row_sums is not None and tile_col == 0:
        tl.store(row_sums + row, sums, mask=row < rows)
    _finish(acc, row, tile_col * BN, rows, cols, bias, row_scale, col_scale, y, preact, ACTIVATION,
            BACKWARD, ROW_SCALES, COL_SCALES)


@triton.jit(do_not_specialize=["rows", "depth"])
def _persistent(a, b, y, preact, bias, row_scale, col_scale, row_sums, rows: tl.int64,
                cols: tl.int64, depth: tl.int64, BM: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
                ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, ROW_SCALES: tl.constexpr,
                COL_SCALES: tl.constexpr, INTEGER: tl.constexpr, INTERPRET: tl.constexpr):
    """As :func:`_product`, one program a multiprocessor at most, operands by TMA descriptors."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    steps = tl.cdiv(depth, BK).to(tl.int32)
    first = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    for turn in range(tl.cdiv(down * across - first, programs)):
        tile_row, tile_col = _tile_of(first + turn * programs, down, across)
        at_row, at_col = (tile_row * BM).to(tl.int32), (tile_col * BN).to(tl.int32)
        acc = tl.zeros([BM, BN], tl.int32 if INTEGER else tl.float32)
        sums = tl.zeros([BM], tl.float32)
        for step in range(steps):
            if A_TURNED:
                left = tl.trans(a.load([step * BK, at_row]))
            else:
                left = a.load([at_row, step * BK])
            if B_TURNED:
                right = b.load([step * BK, at_col])
            else:
                right = tl.trans(b.load([at_col, step * BK]))
            acc = _multiply(left, right, acc, INTERPRET)
            if row_sums is not None and tile_col == 0:
                sums += tl.sum(widen(left), axis=1)
        row = tile_row * BM + tl.arange(0, BM)
        if row_sums is not None and tile_col == 0:
            tl.store(row_sums + row, sums, mask=row < rows)
        _finish(acc, row, tile_col * BN, rows, cols, bias, row_scale, col_scale, y, preact,
                ACTIVATION, BACKWARD, ROW_SCALES, COL_SCALES)


class Tile(NamedTuple):
    """A configuration: rows, columns and depth (bytes) of a tile, its warps, and how near its rate
    comes to that of the largest one."""

    rows: int
    cols: int
    depth_bytes: int
    warps: int
    rate: float


TILES = (Tile(128, 256, 128, 8, 1.0), Tile(128, 128, 128, 8, 0.85), Tile(64, 128, 128, 4, 0.6),
         Tile(64, 32, 128, 4, 0.3))
FP32_TILE = Tile(64, 64, 64, 4, 1.0)  # not on tensor cores, whose TF32 would break the bound
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB of a program; other NVIDIA: 99


def choose_tile(rows: int, cols: int, itemsize: int, loaded: int, capability: int,
                processors: int) -> Tile:
    """The tile with the least time by a model: waves of programs times the work of a tile.

    The rates are the share of its own peak that a tile's ratio of products to loaded bytes leaves;
    they only have to rank the tiles.
    """
    if itemsize == 4:
        return FP32_TILE

    def fits(tile: Tile) -> bool:
        if tile.cols == 256 and 0 < capability < 90:  # its sums beside mma.sync's operands spill
            return False
        # loads below 4 bytes go through registers, with an address each
        return stages(tile, loaded, capability) >= 1 and (loaded >= 4 or tile.rows < 128)

    def time(tile: Tile) -> float:
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
        return triton.cdiv(tiles, processors) * tile.rows * tile.cols / tile.rate

    return min(filter(fits, TILES), key=time)


def stages(tile: Tile, loaded: int, capability: int) -> int:
    """How many loads of a tile's operands, ``loaded`` bytes at a time, are in flight, at most 4.

    As many as shared memory holds beside the result; 1 below 4 bytes, the least that is copied to
    shared memory by itself.
    """
    kib = SHARED.get(capability, 99) if capability else 64
    result = tile.rows * tile.cols * 2 if capability >= 90 else 0  # a persistent program keeps it
    held = (kib * 1024 - result) // ((tile.rows + tile.cols) * tile.depth_bytes)
    return int(min(4, held)) if loaded >= 4 else min(1, held)


class Epilogue(NamedTuple):
    """What follows the sums; ``None`` where there is none. ``backward``: ``preact`` is read."""

    y: Tensor
    preact: Tensor | None = None
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    row_sums: Tensor | None = None
    activation: str = "none"
    backward: bool = False


class Operand(NamedTuple):
    """A matrix whose rows (turned: whose columns) are contiguous, and the stride between them."""

    x: Tensor
    stride: int
    turned: bool

    @property
    def vector(self) -> int:
        """The largest power of two up to 16 that divides the contiguous dimension and stride."""
        return math.gcd(16, self.stride, self.x.shape[0 if self.turned else 1])

    @property
    def by_tma(self) -> bool:
        """Whether a descriptor can describe it: 16-byte addresses and strides."""
        return (self.x.data_ptr() % 16 == 0 and self.stride > 0
                and self.stride * self.x.element_size() % 16 == 0)

    def descriptor(self, rows: int, depth: int) -> TensorDescriptor:
        """The descriptor for tiles of ``rows`` by ``depth``."""
        m, k = self.x.shape
        shape, box = ([k, m], [depth, rows]) if self.turned else ([m, k], [rows, depth])
        return TensorDescriptor(self.x, shape, [self.stride, 1], box)


def _operand(x: Tensor) -> Operand:
    x, row, k = strided(x)
    if k != 1 and x.dtype == torch.int8:  # the int8 tensor cores sum along contiguous codes only
        x = x.contiguous()
        row, k = x.stride(0), 1
    return Operand(x, row, False) if k == 1 else Operand(x, k, True)


def product(a: Tensor, b: Tensor, epilogue: Epilogue) -> None:
    """Writes ``a bᵀ`` of a [M, K] and b [N, K] through the epilogue."""
    (rows, depth), cols = a.shape, b.shape[0]
    left, right = _operand(a), _operand(b)
    capability, processors = launches.capability(a.device), launches.processors(a.device)
    itemsize = a.element_size()
    by_tma = capability >= 90 and depth > 0 and itemsize < 4 and left.by_tma and right.by_tma
    loaded = 16 if by_tma else min(left.vector, right.vector) * itemsize
    tile = choose_tile(rows, cols, itemsize, loaded, capability, processors)
    bk = tile.depth_bytes // itemsize
    y, preact, bias, row_scale, col_scale, row_sums, activation, backward = epilogue
    pointers = (y, preact, bias, row_scale, col_scale, row_sums, rows, cols, depth)
    constants = dict(
        BM=tile.rows, BN=tile.cols, BK=bk, A_TURNED=left.turned, B_TURNED=right.turned,
        ACTIVATION=activation, BACKWARD=backward,
        ROW_SCALES=row_scale is not None and row_scale.numel() > 1,
        COL_SCALES=col_scale is not None and col_scale.numel() > 1,
        INTERPRET=launches.INTERPRETED, num_warps=tile.warps,
        num_stages=stages(tile, loaded, capability),
    )
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    if by_tma:
        launch(_persistent, (min(tiles, processors),), left.descriptor(tile.rows, bk),
               right.descriptor(tile.cols, bk), *pointers, INTEGER=a.dtype == torch.int8,
               **constants, **EXACT)
        return
    launch(_product, (tiles,), left.x, right.x, *pointers, left.stride, right.stride,
           A_VECTOR=left.vector, B_VECTOR=right.vector, **constants, **EXACT)
