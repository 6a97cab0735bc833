"""Inputs that break kernels: special values, odd strides; and equality of bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

SPECIAL_BITS = (
    0x00000000, 0x80000000, 0x7F800000, 0xFF800000,  # zeros, infinities
    0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC12345,  # NaN payloads
    0x00000001, 0x807FFFFF, 0x007FFFFF, 0x00800000,  # subnormals and the smallest normal
    0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F0000, 0x7F7F8000,  # the largest, bf16's largest and its tie
    0x3F800000, 0x3F808000, 0x3F818000, 0x3F800001, 0xBF800001, 0x3FFFFFFF,  # ties at 1
    0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000,  # fp16: largest, below and at the tie, beyond
    0x33000000, 0x33000001, 0x33800000, 0x387FC000, 0x387FE000, 0x38800000, 0x32FFFFFF,  # fp16 tiny
)


def special_values() -> Tensor:
    """fp32 values at which a conversion or a rounding changes its behaviour."""
    return torch.tensor(SPECIAL_BITS, dtype=torch.int64).to(torch.int32).view(torch.float32)


def random_bits(numel: int, seed: int = 0) -> Tensor:
    """fp32 values of uniformly random bit patterns: every exponent, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def strided_forms(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A matrix as tensors of other strides and storage offsets; the values differ by form."""
    yield "contiguous", x
    yield "transposed", x.t()
    yield "every second row", x[::2]
    yield "every second column", x[:, ::2]
    yield "odd storage offset", torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    yield "expanded", x[:1].expand(x.shape)
    yield "no rows", x[:0]
    yield "no columns", x[:, :0]
    yield "one element", x[:1, :1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits (so NaN equals NaN and -0 differs from 0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = _INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
