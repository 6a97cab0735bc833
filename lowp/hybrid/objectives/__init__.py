"""The losses of a hybrid run, and the weights they get.

An objective is called with a model and a batch and gives an :class:`ObjectiveResult`; it has a
``name`` and says by ``stream`` whether it reads labelled or unlabelled batches. A function
``(model, batch) -> loss`` is an objective too.
"""

from lowp.hybrid.objectives.causal_lm import CausalLM
from lowp.hybrid.objectives.consistency import Consistency
from lowp.hybrid.objectives.masked_lm import MaskedLM
from lowp.hybrid.objectives.pseudo_label import PseudoLabel
from lowp.hybrid.objectives.ramp import Ramp
from lowp.hybrid.objectives.result import ObjectiveResult
from lowp.hybrid.objectives.supervised import Supervised

__all__ = [
    "CausalLM",
    "Consistency",
    "MaskedLM",
    "ObjectiveResult",
    "PseudoLabel",
    "Ramp",
    "Supervised",
]
