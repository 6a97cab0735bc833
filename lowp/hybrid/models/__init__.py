"""Text classifiers that are language models too."""

from lowp.hybrid.models.lstm import LSTMClassifier
from lowp.hybrid.models.transformer import TransformerEncoder

__all__ = ["LSTMClassifier", "TransformerEncoder"]
