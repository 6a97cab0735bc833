"""The losses of a hybrid run.

An objective is called with a model and a batch and gives an :class:`ObjectiveResult`; it has a
``name`` and says by ``stream`` whether it reads labelled or unlabelled batches. A function
``(model, batch) -> loss`` is an objective too.
"""

from lowp.hybrid.objectives.annealing import SignalAnnealing
from lowp.hybrid.objectives.causal_lm import CausalLM
from lowp.hybrid.objectives.class_lm import ClassLM
from lowp.hybrid.objectives.consistency import Consistency
from lowp.hybrid.objectives.contrastive import Contrastive
from lowp.hybrid.objectives.denoising import Denoising
from lowp.hybrid.objectives.entropy import EntropyMinimization
from lowp.hybrid.objectives.evidence_bound import EvidenceBound
from lowp.hybrid.objectives.flexmatch import FlexMatch
from lowp.hybrid.objectives.freematch import FreeMatch
from lowp.hybrid.objectives.masked_lm import MaskedLM
from lowp.hybrid.objectives.mean_teacher import MeanTeacher
from lowp.hybrid.objectives.pseudo_label import PseudoLabel
from lowp.hybrid.objectives.result import Objective, ObjectiveResult
from lowp.hybrid.objectives.sequence_to_sequence import SequenceToSequence
from lowp.hybrid.objectives.span_corruption import SpanCorruption
from lowp.hybrid.objectives.span_extraction import SpanExtraction
from lowp.hybrid.objectives.supervised import Supervised
from lowp.hybrid.objectives.thresholds import FixedThreshold
from lowp.hybrid.objectives.uda import UDA
from lowp.hybrid.objectives.virtual_adversarial import VirtualAdversarial

__all__ = [
    "UDA",
    "CausalLM",
    "ClassLM",
    "Consistency",
    "Contrastive",
    "Denoising",
    "EntropyMinimization",
    "EvidenceBound",
    "FixedThreshold",
    "FlexMatch",
    "FreeMatch",
    "MaskedLM",
    "MeanTeacher",
    "Objective",
    "ObjectiveResult",
    "PseudoLabel",
    "SequenceToSequence",
    "SignalAnnealing",
    "SpanCorruption",
    "SpanExtraction",
    "Supervised",
    "VirtualAdversarial",
]
