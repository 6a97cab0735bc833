"""Stochastic and nearest rounding of the reference: tables, fixed points, enumeration."""

from __future__ import annotations

import pytest
import torch

from lowp.reference.rounding import round_stochastic, round_to
from tests.tensors import random_bits, same_bits, special_values

BF16, FP16 = torch.bfloat16, torch.float16

# fp32 bits -> (16-bit code at draw 0, at draw 65535)
TABLE = [
    (BF16, 0x00000000, 0x0000, 0x0000), (BF16, 0x80000000, 0x8000, 0x8000),
    (BF16, 0x00000001, 0x0000, 0x0001), (BF16, 0x007FFFFF, 0x007F, 0x0080),
    (BF16, 0x3F800001, 0x3F80, 0x3F81), (BF16, 0xBF800001, 0xBF80, 0xBF81),
    (BF16, 0x3FFFFFFF, 0x3FFF, 0x4000), (BF16, 0x7F7F0000, 0x7F7F, 0x7F7F),
    (BF16, 0x7F7FFFFF, 0x7F7F, 0x7F7F), (BF16, 0x7F800000, 0x7F80, 0x7F80),
    (BF16, 0x7FFFFFFF, 0x7FC0, 0x7FC0), (BF16, 0xFF800001, 0xFFC0, 0xFFC0),
    (FP16, 0x33000000, 0x0000, 0x0001), (FP16, 0x33800000, 0x0001, 0x0001),
    (FP16, 0x387FC000, 0x03FF, 0x03FF), (FP16, 0x477FE000, 0x7BFF, 0x7BFF),
    (FP16, 0x477FF000, 0x7BFF, 0x7BFF), (FP16, 0x47800000, 0x7BFF, 0x7BFF),
    (FP16, 0xFF800000, 0xFC00, 0xFC00), (FP16, 0xFFFFFFFF, 0xFE00, 0xFE00),
]


def code(values: torch.Tensor) -> list[int]:
    return [v & 0xFFFF for v in values.view(torch.int16).tolist()]


@pytest.mark.parametrize(("dtype", "bits", "low", "high"), TABLE)
def test_table(dtype, bits, low, high):
    x = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert code(round_stochastic(x, dtype, torch.tensor([0]))) == [low]
    assert code(round_stochastic(x, dtype, torch.tensor([65535]))) == [high]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("draw", [0, 1, 32768, 65535])
def test_every_representable_value_is_a_fixed_point(dtype, draw):
    codes = torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)
    finite = codes[codes.float().isfinite()]
    draws = torch.full(finite.shape, draw)
    assert same_bits(round_stochastic(finite.float(), dtype, draws), finite)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_all_draws_together_are_exact(dtype):
    """Over all 65536 draws the round-ups number the fraction itself: no Monte Carlo needed."""
    patterns = [0x3F801234, 0x3F80FFFF, 0x00001000, 0x33123456, 0x38012345, 0x44ABCDEF,
                0xC2000FFF]
    draws = torch.arange(65536)
    for bits in patterns:
        x = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
        results = round_stochastic(x.expand(65536), dtype, draws)
        low, high = results[0].double(), results[-1].double()
        ups = (results.double() != low).sum().item()
        if low == high:
            assert ups == 0
            continue
        exact = ((x.double() - low) / (high - low)).item() * 65536
        assert exact - 1 < ups <= exact  # the fraction is cut to 16 bits, toward zero
        assert set(results.double().tolist()) <= {low.item(), high.item()}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_odd_symmetry(dtype):
    x = random_bits(10_000)
    x = x[x.isfinite()]
    draws = torch.randint(0, 65536, x.shape)
    up, down = round_stochastic(x, dtype, draws), round_stochastic(-x, dtype, draws)
    assert same_bits(up, -down)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_nearest_is_torch_s_but_for_nan(dtype):
    x = torch.cat([random_bits(100_000), special_values()])
    rounded = round_to(x, dtype, "nearest")
    finite = ~x.isnan()
    assert same_bits(rounded[finite], x[finite].to(dtype))
    assert rounded[~finite].isnan().all()
    assert torch.equal(rounded[~finite].signbit(), x[~finite].signbit())
