"""Hybrid training of text models: several objectives over labelled and unlabelled texts."""

from lowp.hybrid.batches import Batch, Stream
from lowp.hybrid.corpus import Corpus, load_dataset_by_name, load_docstrings, load_files
from lowp.hybrid.models import LSTMClassifier, TransformerEncoder
from lowp.hybrid.objectives import (
    UDA,
    CausalLM,
    ClassLM,
    Consistency,
    Contrastive,
    Denoising,
    EntropyMinimization,
    EvidenceBound,
    FlexMatch,
    FreeMatch,
    MaskedLM,
    MeanTeacher,
    ObjectiveResult,
    PseudoLabel,
    SequenceToSequence,
    SignalAnnealing,
    SpanCorruption,
    SpanExtraction,
    Supervised,
    VirtualAdversarial,
)
from lowp.hybrid.ramp import Ramp
from lowp.hybrid.random import Dropout
from lowp.hybrid.tables import CorpusError
from lowp.hybrid.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "UDA",
    "Batch",
    "CausalLM",
    "ClassLM",
    "Consistency",
    "Contrastive",
    "Corpus",
    "CorpusError",
    "Denoising",
    "Dropout",
    "EntropyMinimization",
    "EvidenceBound",
    "FlexMatch",
    "FreeMatch",
    "LSTMClassifier",
    "MaskedLM",
    "MeanTeacher",
    "ObjectiveResult",
    "PseudoLabel",
    "Ramp",
    "SequenceToSequence",
    "SignalAnnealing",
    "SpanCorruption",
    "SpanExtraction",
    "Stream",
    "Supervised",
    "Tokenizer",
    "TransformerEncoder",
    "VirtualAdversarial",
    "load_dataset_by_name",
    "load_docstrings",
    "load_files",
    "train_tokenizer",
]
