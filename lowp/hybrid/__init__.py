"""Hybrid training of text models: several objectives over labelled and unlabelled texts."""

from lowp.hybrid.batches import Batch, Stream
from lowp.hybrid.corpus import Corpus, load_dataset_by_name, load_docstrings, load_files
from lowp.hybrid.models import LSTMClassifier, TransformerEncoder
from lowp.hybrid.objectives import (
    CausalLM,
    Consistency,
    MaskedLM,
    ObjectiveResult,
    PseudoLabel,
    Ramp,
    Supervised,
)
from lowp.hybrid.random import Dropout
from lowp.hybrid.tables import CorpusError
from lowp.hybrid.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "CausalLM",
    "Consistency",
    "Corpus",
    "CorpusError",
    "Dropout",
    "LSTMClassifier",
    "MaskedLM",
    "ObjectiveResult",
    "PseudoLabel",
    "Ramp",
    "Stream",
    "Supervised",
    "Tokenizer",
    "TransformerEncoder",
    "load_dataset_by_name",
    "load_docstrings",
    "load_files",
    "train_tokenizer",
]
