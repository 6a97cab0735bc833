"""Optimizers with the signatures of ``torch.optim`` and stochastic rounding at every store."""

from lowp.optim.accumulate import GradientAccumulation
from lowp.optim.adafactor import Adafactor
from lowp.optim.adam import Adam
from lowp.optim.adamw import AdamW
from lowp.optim.conversion import from_torch, to_torch
from lowp.optim.files import load_state, save_state
from lowp.optim.galore import GaLore
from lowp.optim.lion import Lion
from lowp.optim.muon import Muon
from lowp.optim.release import GradientRelease
from lowp.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "GaLore",
    "GradientAccumulation",
    "GradientRelease",
    "Lion",
    "Muon",
    "from_torch",
    "load_state",
    "save_state",
    "to_torch",
]
