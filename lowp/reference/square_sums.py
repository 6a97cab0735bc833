"""Sums of squares in fp64, in an order that is part of the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LANES = 16
RUN = 1024


def lane_sums(x: Tensor) -> Tensor:
    """Sum over the last dimension of ``x`` [..., n]: element i belongs to lane i % 16, each lane is
    added up in order, then lane i + 8 to lane i, i + 4 to i, i + 2 to i and 1 to 0."""
    padded = functional.pad(x, (0, -x.shape[-1] % LANES))
    chunks = padded.unflatten(-1, (padded.shape[-1] // LANES, LANES))
    lanes = torch.zeros_like(chunks[..., 0, :])
    for chunk in chunks.unbind(-2):
        lanes = lanes + chunk
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    return lanes.squeeze(-1)


def square_sum(x: Tensor) -> float:
    """Sum of the squares of ``x``, any float type: row-major runs of 1024, added in order."""
    squares = x.reshape(-1).float().double().square()
    runs = functional.pad(squares, (0, -squares.numel() % RUN)).view(-1, RUN)
    total = 0.0
    for run in lane_sums(runs).tolist():
        total += run
    return total


def square_sums(xs: Sequence[Tensor]) -> Tensor:
    """fp64 [len(xs)] on the device of ``xs``."""
    device = xs[0].device if xs else torch.device("cpu")
    return torch.tensor([square_sum(x) for x in xs], dtype=torch.float64, device=device)
