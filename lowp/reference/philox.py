"""Philox4x32: the counter-based generator behind every stochastic rounding.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3; seven
rounds are the fewest that pass BigCrush (table 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MASK = 0xFFFFFFFF


def philox4x32(counter: list[Tensor], key: tuple[int, int], rounds: int = ROUNDS) -> list[Tensor]:
    """Four output words for four counter words, all int64 tensors that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def draws(seed: int, step: int, tensor: int, role: int, numel: int, offset: int = 0) -> Tensor:
    """16-bit draws of elements ``offset .. offset + numel - 1``: int64 in 0..65535, [numel].

    Element e belongs to group g = e // 8, lane j = e % 8; the key is (seed low, seed high), the
    counter (g low, g[47:32] | role << 16, step, tensor), and the draw is the low (j even) or high
    (j odd) half of output word j // 2.
    """
    first, skip = divmod(offset, 8)
    groups = torch.arange(first, first + (skip + numel + 7) // 8, dtype=torch.int64)
    counter = [
        groups & _MASK,
        ((groups >> 32) & 0xFFFF) | (role << 16),
        torch.full_like(groups, step & _MASK),
        torch.full_like(groups, tensor & _MASK),
    ]
    words = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [groups, 4, 2]
    return halves.reshape(-1)[skip : skip + numel]
