"""The generators of Python, NumPy and torch, for objectives and models that use them."""

from __future__ import annotations

import random as python_random
from typing import Any

import numpy
import torch


def random_state() -> dict[str, Any]:
    """Where all of them stand, as tensors and plain values."""
    _, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": python_random.getstate(),
        "numpy": [torch.from_numpy(numpy.asarray(keys).copy()), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where :func:`random_state` was taken."""
    python_random.setstate(state["python"])
    keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state(("MT19937", keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
