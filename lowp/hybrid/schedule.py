"""The learning rate of a step."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at ``step`` (1 at the first): linear warm-up, then cosine to zero.

    Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5 without restarts. The rate is positive at
    every step of the run, the last included.
    """
    rising = round(warmup * steps)
    if step <= rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising - 1) / max(1, steps - rising)))


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Set each group's rate to ``factor`` times its first one, kept as ``initial_lr``."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
