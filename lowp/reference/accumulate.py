"""The addition of a gradient to a total of any float type, by definition."""

from __future__ import annotations

from torch import Tensor

from lowp.reference.stores import Noise, no_nan_payload, store


def accumulate(total: Tensor, grad: Tensor, rounding: str, noise: Noise) -> None:
    """``total += grad`` in fp32 with one rounding."""
    store(no_nan_payload(total.float() + grad.float()), total, rounding, noise, 8)
