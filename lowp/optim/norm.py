"""The norm of all gradients together, on their own device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowp.ops.square_sums import square_sums
from lowp.optim import sharding


def gradient_norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all elements of ``grads``, fp64 [], on the CPU if all of them are there.

    Else on the first other device, and no host waits for it. Sharded gradients are gathered one by
    one, so that the norm has one process's bits.
    """
    sharded: list[Tensor] = []
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        (sharded if sharding.is_sharded(g) else by_device.setdefault(g.device, [])).append(g)
    sums = [square_sums(xs) for xs in by_device.values()]
    sums += [square_sums([sharding.whole(g)]) for g in sharded]
    return _total(sums).sqrt()


def _total(sums: Sequence[Tensor]) -> Tensor:
    """The sum of all elements, in no order: however tensors are grouped, it has the same bits."""
    device = next((x.device for x in sums if not x.is_cpu), None)
    if device is None:
        exact = math.fsum(value for x in sums for value in x.tolist())
        return torch.tensor(exact, dtype=torch.float64)
    return total_on_device(torch.cat([x.to(device, non_blocking=True) for x in sums]))


def total_on_device(x: Tensor) -> Tensor:
    """The sum of fp64 ``x`` [n], none below 0, n > 0, without a read by the host.

    Error-free slices (Rump, Ogita and Oishi, "Accurate floating-point summation part I", SIAM J.
    Sci. Comput. 31, 2008): x + top, with top at least 2 n times the largest, keeps of x the
    multiples of an ulp of top, whose sum is exact in any order; what it drops is sliced once more.
    What both drop is below n^3 2^-101 of the largest, so the result is the exact sum's rounding
    unless that decides a tie; and no order changes it there either.
    """
    bits = 1 + (len(x) - 1).bit_length()
    top = x.amax() * 2.0**bits
    high = (x + top) - top
    rest = top * 2.0 ** (bits - 52)
    low = (x - high + rest) - rest
    return torch.where(top.isfinite(), high.sum() + low.sum(), top)
