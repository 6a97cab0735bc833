"""Words and sub-words: a vocabulary learned from the training split, by ``tokenizers``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor

PAD, UNK, MASK, CLS, EOS = range(5)
SPECIAL = ("[PAD]", "[UNK]", "[MASK]", "[CLS]", "[EOS]")
MAX_WORD = 64  # characters; a longer word is unknown


def _pipeline(model: Any) -> Any:
    """Unicode to NFKC and lower case, words and punctuation apart, then the model."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


class Tokenizer:
    """Texts to token numbers: pad 0, unknown 1, mask 2, start 3, end 4, then the vocabulary.

    No text is read as one of the special tokens, whatever it says.
    """

    def __init__(self, inner: Any) -> None:
        for number, token in enumerate(SPECIAL):
            if inner.token_to_id(token) != number:
                raise ValueError(f"lowp.hybrid.Tokenizer: token {token} must be number {number}, "
                                 f"got {inner.token_to_id(token)}")
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, the special ones included."""
        return int(self._inner.get_vocab_size())

    def encode_batch(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """``[start, tokens…, end]`` of each text, cut to ``max_length`` with the end kept.

        Raises:
            ValueError: max_length is below 2.
        """
        if max_length < 2:
            raise ValueError("lowp.hybrid.Tokenizer.encode_batch: max_length must be at least 2, "
                             f"got {max_length}")
        found = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [[CLS, *encoding.ids[: max_length - 2], EOS] for encoding in found]

    def token(self, number: int) -> str:
        """The token of a number."""
        return str(self._inner.id_to_token(number))

    def continues(self) -> Tensor:
        """Which tokens continue a word, bool [V]: those that word pieces write with ``##``."""
        return torch.tensor([self.token(n).startswith("##") for n in range(self.vocab_size)])

    def to_json(self) -> str:
        """All that the tokenizer is, as JSON."""
        return str(self._inner.to_str())

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that :meth:`to_json` wrote.

        Raises:
            ValueError: it is not one, or its special tokens have other numbers.
        """
        try:
            kind = json.loads(text)["model"]["type"]
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises plain Exception
            raise ValueError("lowp.hybrid.Tokenizer.from_json: expected the JSON of a tokenizer, "
                             f"got {error}") from error
        if kind not in ("WordPiece", "WordLevel"):
            raise ValueError("lowp.hybrid.Tokenizer.from_json: model must be WordPiece or "
                             f"WordLevel, got {kind}")
        return cls(inner)


def _word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each normalized word occurs."""
    pipeline = _pipeline(models.WordLevel({}, unk_token=SPECIAL[UNK]))
    counts: Counter[str] = Counter()
    for text in texts:
        normal = pipeline.normalizer.normalize_str(text)
        counts.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(normal))
    return counts


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "wordpiece") -> Tokenizer:
    """Learn a vocabulary of at most ``vocab_size`` tokens; equal texts give equal vocabularies.

    Args:
        texts: the training split, and nothing that is held out.
        vocab_size: the special tokens included.
        kind: ``"word"``, the most frequent words; or ``"wordpiece"``, sub-words merged from
            characters by frequency (Schuster and Nakajima, ICASSP 2012).

    Raises:
        ValueError: an unknown kind, a vocab_size below 64, or no words in the texts.
    """
    if kind not in ("wordpiece", "word"):
        raise ValueError("lowp.hybrid.train_tokenizer: kind must be 'wordpiece' or 'word', "
                         f"got {kind!r}")
    if vocab_size < 64:
        raise ValueError("lowp.hybrid.train_tokenizer: vocab_size must be at least 64, "
                         f"got {vocab_size}")
    counts = _word_counts(texts)
    if not counts:
        raise ValueError("lowp.hybrid.train_tokenizer: texts must hold at least one word")
    if kind == "word":
        words = sorted(counts, key=lambda word: (-counts[word], word))
        vocabulary = [*SPECIAL, *words[: vocab_size - len(SPECIAL)]]
        numbers = {token: number for number, token in enumerate(vocabulary)}
        return Tokenizer(_pipeline(models.WordLevel(numbers, unk_token=SPECIAL[UNK])))
    return Tokenizer(_pipeline(models.WordPiece(
        _word_pieces(counts, vocab_size), unk_token=SPECIAL[UNK], max_input_chars_per_word=MAX_WORD,
    )))


def _word_pieces(counts: Counter[str], vocab_size: int) -> dict[str, int]:
    """The vocabulary of word pieces.

    The trainer numbers the characters in the order of a hash table, which differs from process to
    process, and breaks ties by number; given to it beforehand, they have fixed numbers. Rare
    characters, of which other scripts have thousands, get no token.
    """
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    common = sorted(characters, key=lambda c: (-characters[c], c))[: vocab_size // 4]
    alphabet = sorted(common)
    known = set(alphabet)
    words = sorted(word for word in counts if len(word) <= MAX_WORD and known.issuperset(word))
    pipeline = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL[UNK]))
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        special_tokens=[*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet)],
    )
    lines = (" ".join([word] * counts[word]) for word in words)
    pipeline.train_from_iterator(lines, trainer)
    return dict(pipeline.get_vocab())
