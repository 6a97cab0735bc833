"""The smallest training run with every part: two streams, dropout, three kinds of random state."""

from __future__ import annotations

import random as python_random
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import lowp
from lowp.hybrid.random import Dropout, stream_id, uniform
from lowp.hybrid.trainer import Trainer, WeightedObjective
from lowp.key import clock


class Numbers:
    """An endless stream of pairs x [8, 6], y [8] that depend on the cursor alone."""

    def __init__(self, seed: int) -> None:
        self.seed, self.cursor = seed, 0

    def next(self) -> tuple[Tensor, Tensor]:
        x = uniform((8, 6), self.seed, self.cursor, 0, 99) * 4 - 2
        self.cursor += 1
        return x, (x[:, 0] > x[:, 1]).long()

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


class Network(nn.Module):
    """6 → 16 → 2 in bf16, with keyed dropout and torch's own.

    Args:
        is_lowp: int8 layers, whose gradients are rounded stochastically, for ``nn.Linear``.
    """

    def __init__(self, is_lowp: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.keyed, self.torchs = Dropout(0.2, name="keyed"), nn.Dropout(0.1)
        self.outer = nn.Linear(16, 2)
        self.to(torch.bfloat16)
        if is_lowp:
            lowp.convert(self, "int8_full")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.torchs(self.keyed(torch.tanh(self.inner(x.bfloat16()))))
        return self.outer(hidden).float()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Noisy:
    """A consistency loss whose noise comes from every generator there is; counts its calls."""

    name, stream = "noisy", "unlabelled"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        scale = python_random.random() + float(numpy.random.rand()) + 1 / self.calls
        keyed = uniform(batch[0].shape, 0, int(clock.step), stream_id("noisy"), 17)
        noise = scale * torch.randn_like(batch[0]) + keyed
        return (model(batch[0]) - model(batch[0] + 0.1 * noise)).square().mean()

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def accuracy(model: nn.Module) -> dict[str, float]:
    """On numbers that no step sees."""
    model.eval()
    x, y = Numbers(7).next()
    with torch.no_grad():
        return {"accuracy": float((model(x).argmax(-1) == y).float().mean())}


def toy_trainer(steps: int = 40, is_lowp: bool = False, **options: Any) -> Trainer:
    """A trainer of the network above; the same call gives the same bits.

    Args:
        is_lowp: int8 layers and stochastically rounded weights and states, else torch's own.
    """
    torch.manual_seed(0)
    numpy.random.seed(0)
    python_random.seed(0)
    clock.set(1)
    model = Network(is_lowp)
    optimizer: torch.optim.Optimizer
    if is_lowp:
        optimizer = lowp.optim.AdamW(model.named_parameters(), lr=1e-2, rounding="stochastic")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    terms = [
        WeightedObjective(classify, name="supervised"),
        WeightedObjective(Noisy(), lambda step: min(1.0, step / 20)),
    ]
    chosen: dict[str, Any] = {"evaluate": accuracy, "eval_every": 10, "checkpoint_every": 5}
    return Trainer(model, optimizer, terms, Numbers(1), Numbers(2), steps=steps,
                   **{**chosen, **options})


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without the one thing that a repetition does not repeat."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]
