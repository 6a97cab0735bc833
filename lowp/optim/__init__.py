"""Optimizers with the signatures of ``torch.optim`` and stochastic rounding at every store."""

from lowp.optim.adamw import AdamW
from lowp.optim.conversion import from_torch, to_torch
from lowp.optim.files import load_state, save_state
from lowp.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "from_torch", "load_state", "save_state", "to_torch"]
