"""The 8-bit codes of optimizer states: every code, ties, neighbours, and what the coding costs."""

from __future__ import annotations

import math

import torch

from lowp.reference.codec import BLOCK, decode, encode


def all_values(top: int) -> torch.Tensor:
    """What the codes 0 .. top stand for under scale 1."""
    bits = 0x3F800000 - ((top - torch.arange(top + 1)) << 20)
    values = bits.to(torch.int32).view(torch.float32)
    return torch.where(torch.arange(top + 1) == 0, 0.0, values)


def test_every_code_round_trips():
    for signed, top, dtype in ((True, 127, torch.int8), (False, 255, torch.uint8)):
        values = all_values(top)
        if signed:
            values = torch.cat([-values.flip(0)[:-1], values])
        for scale in (1.0, 3.7, 2.0**-118, 2.0**120):
            x = torch.cat([torch.tensor([1.0]), values])[None] * scale  # the first sets the scale
            codes, scales = encode(x, signed)
            assert codes.dtype == dtype and torch.equal(scales[:, :1], torch.full((1, 1), scale))
            again, _ = encode(decode(codes, scales), signed)
            assert torch.equal(again, codes)
            # only the first block holds the value that sets the scale
            kept = slice(0, BLOCK)
            assert torch.equal(decode(codes, scales)[:, kept], x[:, kept])


def test_nearest_picks_the_nearer_neighbour():
    values = all_values(127).double()
    x = torch.rand(1, 200) ** 6
    x[0, 0] = 1.0
    codes, scale = encode(x, True)
    distance = (x.double().reshape(-1, 1) - values).abs()
    chosen = distance.gather(1, codes.long().reshape(-1, 1)).squeeze(1)
    assert (chosen <= distance.min(1).values * (1 + 1e-6)).all()
    assert scale.item() == 1.0


def test_stochastic_is_one_of_two_neighbours_and_unbiased():
    values = all_values(127)
    x = torch.cat([torch.ones(1), torch.rand(15) ** 4, torch.rand(16) * 2.0**-17])[None]
    total = torch.zeros(32, dtype=torch.float64)
    draws = 65536
    for start in range(0, draws, 4096):  # every draw once: the exact mean, no chance left
        r = torch.arange(start, start + 4096).repeat_interleave(32)
        rows = x.expand(4096, 32)
        codes, scale = encode(rows, True, r)
        decoded = decode(codes, scale)
        index = torch.searchsorted(values, x[0].clamp_max(1.0), right=True) - 1
        low, high = values[index], values[(index + 1).clamp_max(127)]
        assert ((decoded == low) | (decoded == high)).all()
        total += decoded.double().sum(0)
    step = torch.maximum(x[0] / 8, torch.tensor(1.25 * 2.0**-16))
    # the fraction is cut to 16 bits: the mean is at most 2^-16 of the spacing low, fp32 aside
    error = (total / draws - x[0].double()).abs()
    assert (error <= step * 2.0**-15).all()


def test_zero_tiny_and_non_finite_blocks():
    x = torch.zeros(5, 300)
    x[1] = 2.0**-120
    x[2, 7] = math.nan
    x[3, 299] = math.inf
    x[4, 0] = 1e-30
    codes, scale = encode(x, True)
    assert scale.shape == (5, 2)
    assert scale[0].tolist() == [0, 0] and scale[1].tolist() == [0, 0]
    assert scale[2, 0].isnan() and scale[2, 1] == 0
    assert scale[3, 1].isnan() and scale[4].tolist() == [x[4, 0].item(), 0]
    assert not codes[:4].any() and codes[4, 0] == 127
    back = decode(codes, scale)
    assert not back[:2].any() and back[2, :256].isnan().all() and not back[2, 256:].any()


def test_what_is_above_zero_keeps_a_code():
    x = torch.full((1, 256), 1e-20)
    x[0, 0], x[0, 5] = 1.0, 0.0
    codes, _ = encode(x, False)
    assert codes[0, 5] == 0 and (codes[0, 6:] == 1).all()


def test_inflation_of_the_inverse_root_on_heavy_tails():
    """Why 3 mantissa bits: worst 1/sqrt(v) inflation at most 1.3 on lognormal(sigma = 3)."""
    v = (torch.randn(4096, 256).double() * 3).exp().float()
    root = v.sqrt()
    codes, scale = encode(root, False)
    decoded = decode(codes, scale)
    assert (decoded > 0).all()
    assert (root / decoded).max() <= 1.3


def test_shapes():
    for shape in ((), (1,), (255,), (256,), (257,), (3, 700), (2, 3, 10), (0, 5), (5, 0)):
        x = torch.randn(shape)
        codes, scale = encode(x, True)
        assert codes.shape == x.shape
        assert decode(codes, scale).shape == x.shape
        if x.numel():
            assert (decode(codes, scale) - x).abs().max() <= x.abs().max() / 16
