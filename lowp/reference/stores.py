"""How updates load weights and states into fp32 and round them back, by definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowp.reference.codec import decode, encode
from lowp.reference.philox import draws
from lowp.reference.rounding import round_to


class Noise(NamedTuple):
    """Which random bits a tensor's update draws."""

    seed: int
    step: int
    tensor: int
    offset: int

    def of(self, x: Tensor, role: int) -> Tensor:
        """One draw for each element of ``x``."""
        return draws(self.seed, self.step, self.tensor, role, x.numel(), self.offset).view(x.shape)


def fp32(x: float) -> float:
    """``x`` rounded once to fp32, as scalars reach the kernels."""
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


def no_nan_payload(x: Tensor) -> Tensor:
    """Every NaN becomes 0x7FC00000, since machines differ in which payload they pass on."""
    return torch.where(x.isnan(), torch.nan, x)


def sqrt(x: Tensor) -> Tensor:
    """The IEEE square root of fp32: torch's may be one ulp off (MKL), through fp64 it is exact."""
    return x.double().sqrt().float()


def store(x: Tensor, target: Tensor, rounding: str, noise: Noise, role: int) -> None:
    """Round ``x`` (fp32) into ``target``."""
    drawn = noise.of(x, role) if rounding == "stochastic" and target.dtype != x.dtype else None
    target.copy_(round_to(x, target.dtype, rounding, drawn))


def load_state(state: Tensor, scale: Tensor) -> Tensor:
    """fp32 values of a state: floats, or codes with their scales."""
    return state.float() if state.is_floating_point() else decode(state, scale)


def store_state(x: Tensor, state: Tensor, scale: Tensor, rounding: str, noise: Noise,
                role: int) -> None:
    """Round or encode ``x`` into a state."""
    if state.is_floating_point():
        store(x, state, rounding, noise, role)
        return
    drawn = noise.of(x, role) if rounding == "stochastic" else None
    codes, scales = encode(x, state.dtype == torch.int8, drawn)
    state.copy_(codes)
    scale.copy_(scales)


def load_weight(param: Tensor, master: Tensor | None) -> Tensor:
    """The weight in fp32.

    ``master``: ``None`` or empty; the int16 low bits of the fp32 value, as a distance from the bf16
    ``param``; or, in the parameter's type, what its last rounding lost.
    """
    if master is None or master.numel() == 0:
        return param.float()
    if master.dtype != torch.int16:
        return param.float() + master.float()
    bits = (param.contiguous().view(torch.int16).long() << 16) + master.long() & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def store_weight(x: Tensor, param: Tensor, master: Tensor | None, rounding: str,
                 noise: Noise) -> None:
    """Round ``x`` (fp32) into ``param`` and keep in ``master`` what that loses.

    int16: ``param`` is the nearest bf16, ties away from zero, and nothing is lost. Else ``param``
    is nearest, ties to even, and the error is stored with ``rounding`` (0 where that became Inf).
    """
    if master is None or master.numel() == 0:
        store(x, param, rounding, noise, 0)
        return
    if master.dtype == torch.int16:
        bits = x.contiguous().view(torch.int32).long()
        param.copy_((bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16))
        master.copy_(bits.to(torch.int16))
        return
    nearest = round_to(x, param.dtype, "nearest")
    lost = no_nan_payload(x - nearest.float())
    param.copy_(nearest)
    store(torch.where(nearest.isinf(), 0.0, lost), master, rounding, noise, 0)
