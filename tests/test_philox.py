"""The random bits: published known answers, the contract's draws, independence of streams."""

from __future__ import annotations

import math

import pytest
import torch

from lowp.reference.philox import draws, philox4x32

# Random123's kat_vectors (philox4x32 with 7 and 10 rounds) and the contract's own: counter words,
# key words, result. Salmon et al., SC'11; https://github.com/DEShawResearch/random123
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
ZEROS = ((0,) * 4, (0,) * 2)
KNOWN = [
    (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "inputs", "expected"), KNOWN)
def test_known_answers(rounds, inputs, expected):
    counter, key = inputs
    words = [torch.tensor([word], dtype=torch.int64) for word in counter]
    assert tuple(word.item() for word in philox4x32(words, key, rounds)) == expected


def test_draws_of_the_contract():
    first = "6e01 4069 6cfc 7c43 2bbf acf6 f8a8 a7ee 6d87 f4e0 042a 4fee a7a4 db4b 9f76 71db"
    far = "69c2 eab3 5cbf 35a2 bc8f"
    seed, tensor = 0x0123456789ABCDEF, 0x811C9DC5
    assert [f"{d:04x}" for d in draws(seed, 1, tensor, 0, 16).tolist()] == first.split()
    assert [f"{d:04x}" for d in draws(seed, 1, tensor, 6, 5, 2**36 + 5).tolist()] == far.split()


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 13, 2**33 + 3])
def test_a_shard_draws_what_the_whole_tensor_draws(offset):
    whole = draws(3, 2, 1, 0, 100, offset)
    parts = [draws(3, 2, 1, 0, n, offset + start) for start, n in ((0, 9), (9, 1), (10, 90))]
    assert torch.equal(whole, torch.cat(parts))


def test_bits_are_uniform():
    """Chi-square over the 256 values of either byte: 255 degrees of freedom.

    159.4 and 381.1 are the 5e-7 and 1 - 5e-7 quantiles; the seed is fixed, so the false-alarm rate
    (1e-6 a byte) governs changes of the generator only.
    """
    values = draws(11, 5, 7, 0, 2**18)
    for byte in (values & 0xFF, values >> 8):
        counts = torch.bincount(byte, minlength=256).double()
        expected = values.numel() / 256
        assert 159.4 < ((counts - expected) ** 2 / expected).sum().item() < 381.1


@pytest.mark.parametrize(
    "other", [dict(seed=12), dict(step=6), dict(tensor=8), dict(role=1), dict(offset=1),
              dict(offset=4), dict(offset=8)],
)
def test_streams_are_independent(other):
    """|correlation| sqrt(n) < 5.73: two-sided Bonferroni at 1e-6 over 100 comparisons."""
    base = dict(seed=11, step=5, tensor=7, role=0, offset=0)
    n = 2**16
    a = draws(numel=n, **base).double()
    b = draws(numel=n, **{**base, **other}).double()
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) * math.sqrt(n) < 5.73
